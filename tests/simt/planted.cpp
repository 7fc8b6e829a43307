// Kernels with one bug each, and a twin without: each build of the runner must catch the bugs of its kind.
// Argument: the bug's name. Prints "caught" or "not caught"; the sanitizers end the program on their own.
#define SIMT_CPU
#include "simt.h"

__global__ void beyond_global(float* p, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) p[i] = 1;
}
__global__ void beyond_shared(float* p, int) {
  __shared__ float s[64];
  s[threadIdx.x + 1] = 1;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
__global__ void misaligned(float* p, int) {
  struct alignas(16) Four {
    float v[4];
  };
  const Four four = *reinterpret_cast<Four*>(p + 1);
  p[threadIdx.x] = four.v[0];
}
template <bool mended>
__global__ void no_barrier(float* p, int) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  if (mended) __syncthreads();
  p[threadIdx.x] = s[63 - threadIdx.x];
}
template <bool mended>
__global__ void overwritten(float* p, int) {  // the next round's writes overtake this round's reads
  __shared__ float s[64];
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    s[threadIdx.x] = round;
    __syncthreads();
    sum += s[63 - threadIdx.x];
    if (mended) __syncthreads();
  }
  p[threadIdx.x] = sum + 60 - threadIdx.x;  // 63 - thread
}
template <bool mended>
__global__ void no_syncwarp(float* p, int) {
  __shared__ float s[64];
  s[threadIdx.x] = 63 - threadIdx.x;
  if (mended) __syncwarp();
  const int other = threadIdx.x ^ 31;
  p[other] = s[other];
}
__global__ void blocks_race(float* p, int) { p[threadIdx.x] += 1; }
template <bool mended>
__global__ void uninitialised(float* p, int) {
  __shared__ float s[64];
  if (mended || threadIdx.x) s[threadIdx.x] = 63 - threadIdx.x;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
__global__ void divergent_barrier(float* p, int) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p[threadIdx.x] = 1;
}
__global__ void barrier_after_exit(float* p, int) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  p[threadIdx.x] = 1;
}
__global__ void shuffle_without_all(float* p, int) {
  if (threadIdx.x % 32 < 16)
    p[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
  else
    __syncthreads();
}
__global__ void shuffle_from_outside(float* p, int) {
  if (threadIdx.x % 32 < 16) p[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 20);
}
__global__ void nothing(float*, int) {}

int main(int, char** arguments) {
  const std::string bug = arguments[1];
  simt::seed = 2 * atoi(arguments[2]) + 1;
  constexpr int n = 64;
  float* p = static_cast<float*>(malloc(n * sizeof(float)));
  std::fill(p, p + n, 0.f);
  bool compare = false;
  unsigned grid = 1;
  size_t shared = 0;
  void (*kernel)(float*, int) = nullptr;
  const auto plant = [&](const char* name, void (*k)(float*, int), bool compares = false) {
    if (bug == name) kernel = k, compare = compares;
  };
  plant("beyond_global", beyond_global);
  plant("beyond_shared", beyond_shared);
  plant("misaligned", misaligned);
  plant("no_barrier", no_barrier<false>, true);
  plant("no_barrier_mended", no_barrier<true>, true);
  plant("overwritten", overwritten<false>, true);
  plant("overwritten_mended", overwritten<true>, true);
  plant("no_syncwarp", no_syncwarp<false>, true);
  plant("no_syncwarp_mended", no_syncwarp<true>, true);
  plant("uninitialised", uninitialised<false>, true);
  plant("uninitialised_mended", uninitialised<true>, true);
  plant("blocks_race", blocks_race);
  plant("divergent_barrier", divergent_barrier);
  plant("barrier_after_exit", barrier_after_exit);
  plant("shuffle_without_all", shuffle_without_all);
  plant("shuffle_from_outside", shuffle_from_outside);
  plant("too_much_shared_memory", nothing);
  if (bug == "blocks_race") grid = 2;
  if (bug == "beyond_global") grid = 2;
  if (bug == "too_much_shared_memory") shared = 50000;
  try {
    simt::launch(grid, n, shared, kernel, p, n);
  } catch (const simt::Error& error) {
    printf("caught: %s\n", error.what());
    return 1;
  }
  bool wrong = false;  // the kernels that are compared leave 63 - thread
  for (int i = 0; i < n; ++i) wrong |= compare && !(p[i] == 63 - i);
  free(p);
  puts(wrong ? "caught: wrong values" : "not caught");
  return wrong;
}
