#include "cuda/select_winners.h"

#include "cuda/check.h"
#include "cuda/launch.h"

namespace eqr::cuda {

using Selecting = SelectWinners<Device>;

__global__ void __launch_bounds__(Selecting::kThreads, 1)
    select_winners_kernel(const __grid_constant__ Problem p, int64_t* winner, float* logits, uint64_t* ballots) {
  Selecting{p, winner, logits, ballots}.run();
}

void select_winners(const Problem& p, int64_t* winner, float* logits, int64_t* ballots, cudaStream_t stream) {
  constexpr int64_t kMostCtas = 1024;
  const unsigned ctas = unsigned(p.puzzles < kMostCtas ? p.puzzles : kMostCtas);
  select_winners_kernel<<<ctas, Selecting::kThreads, sizeof(Selecting::Shared), stream>>>(
      p, winner, logits, reinterpret_cast<uint64_t*>(ballots));
  check(cudaGetLastError(), "launching select_winners_kernel");
}

void load_selection() {
  cudaFuncAttributes about;
  check(cudaFuncGetAttributes(&about, select_winners_kernel), "cudaFuncGetAttributes of select_winners_kernel");
}

}  // namespace eqr::cuda
