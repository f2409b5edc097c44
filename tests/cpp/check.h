// Tests that register themselves, and checks that count what fails.
#pragma once

#include <sstream>
#include <string>

namespace eqr::test {

struct Registrar {
  Registrar(const char* name, void (*run)());
};

void failed(const char* file, int line, const std::string& what);  // from any thread
[[noreturn]] void skip(const std::string& reason);                 // ends the test, which then counts as skipped

}  // namespace eqr::test

#define TEST(name) \
  static void name(); \
  static const eqr::test::Registrar registrar_##name(#name, name); \
  static void name()

// CHECK(condition, what, to, print)
#define CHECK(condition, ...) \
  do { \
    if (!(condition)) eqr::test::failed(__FILE__, __LINE__, #condition + eqr::test::text(__VA_ARGS__)); \
  } while (false)

namespace eqr::test {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << " | " << parts), ...);
  return out.str();
}

}  // namespace eqr::test
