# Flags that come behind the user's own (CXXFLAGS, LDFLAGS, CUDAFLAGS, those of a build type), for all that is compiled
# where this is included. An order of operations that is written down is the one that runs, NaN and infinity stay what
# they are, and the instruction set is chosen when a program runs, whatever the machine that built it has.
set(eqr_last_flags -fno-fast-math -fno-unsafe-math-optimizations -ffp-contract=off -fno-lto)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND eqr_last_flags -march=x86-64)
endif()
list(JOIN eqr_last_flags "," eqr_last_host_flags)
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${eqr_last_flags}>"
                    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${eqr_last_host_flags}>")
# A linker that is told -ffast-math or -Ofast brings start-up code that switches denormals off in the whole process.
add_link_options(-fno-fast-math -fno-unsafe-math-optimizations -O1)

# What no later flag undoes is refused: `regex` in `flags`, which the user sets by `source`.
function(eqr_refuse_flags source flags regex why)
  string(REGEX MATCHALL " (${regex})" refused " ${flags}")
  if(refused)
    list(TRANSFORM refused STRIP)
    list(JOIN refused " " refused)
    message(FATAL_ERROR "eqr_kernels: ${source} has ${refused}; ${why}. Take it out of ${source} and build again")
  endif()
endfunction()

string(TOUPPER "${CMAKE_BUILD_TYPE}" eqr_type)
foreach(eqr_variable IN ITEMS CMAKE_CXX_FLAGS CMAKE_CXX_FLAGS_${eqr_type})
  set(eqr_source "CXXFLAGS or CPPFLAGS (${eqr_variable})")
  eqr_refuse_flags(
    "${eqr_source}" "${${eqr_variable}}" "-m(avx|amx|fma|f16c|sse3|ssse3|sse4|bmi|lzcnt|popcnt)[^ ]*"
    "kernels for every instruction set are built anyway, and the best one that runs is chosen when they run")
  eqr_refuse_flags(
    "${eqr_source}" "${${eqr_variable}}"
    "(-mfpmath|-mrecip|-mdaz-ftz|-fsingle-precision-constant|-ff?p-model[= ]fast|-fdenormal-fp-math)[^ ]*"
    "it changes arithmetic on whose bits the kernels' promises rest")
  string(REGEX MATCHALL " -(march=|Ofast|flto|f(fast|unsafe|associative|reciprocal|finite)-math|ffp-contract=)[^ ]*"
                        eqr_overruled " ${${eqr_variable}}")
  if(eqr_overruled)
    list(TRANSFORM eqr_overruled STRIP)
    list(JOIN eqr_overruled " " eqr_overruled)
    message(STATUS "eqr_kernels: ${eqr_overruled} of ${eqr_source} is overruled: results would depend on it")
  endif()
endforeach()
eqr_refuse_flags("LDFLAGS (CMAKE_MODULE_LINKER_FLAGS)" "${CMAKE_MODULE_LINKER_FLAGS}" "-mdaz-ftz"
                 "it switches denormals off in every process that loads the extension")
