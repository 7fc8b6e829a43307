// combine_: points[k, i] = sum_m coefficients[k, m] * states[m, i], 0 where keep[i] is 0.
// Memory bound. Per parameter: M states and a mask byte read once for up to `chunk` points, which are written:
// 4 M + 1 + 4 K bytes, 2 M K floating-point operations.
#pragma once
#include "portable.cuh"

namespace lottery {

constexpr int kCombineThreads = 256;

// N parameters of a state, 0 where pruned
template <int N>
__device__ inline Pack<float, N> masked(const float* state, const Pack<unsigned char, N>& kept) {
  Pack<float, N> x = pack<N>(state);
#pragma unroll
  for (int j = 0; j < N; ++j) x.v[j] = kept.v[j] ? x.v[j] : 0.f;
  return x;
}

// N parameters from i on, for all points of this block's chunk; M > 0: that many states, held in registers
template <int M, int N>
__device__ inline void combine_pack(float* points, const float* states, const float* c, const unsigned char* keep,
                                    long long size, int count, int chunk, long long i) {
  Pack<float, N> x[M > 0 ? M : 1];
  Pack<unsigned char, N> kept;
#pragma unroll
  for (int j = 0; j < N; ++j) kept.v[j] = 1;
  if (keep) kept = pack<N>(keep + i);
#pragma unroll
  for (int m = 0; m < M; ++m) x[m] = masked<N>(states + m * size + i, kept);
  points += i;
  for (int k = 0; k < chunk; ++k, points += size) {  // a running pointer: else nvcc splits the store
    Pack<float, N> sum = {};
#pragma unroll(M > 0 ? M : 1)
    for (int m = 0; m < (M > 0 ? M : count); ++m) {
      if (M == 0) x[0] = masked<N>(states + m * size + i, kept);
#pragma unroll
      for (int j = 0; j < N; ++j) sum.v[j] += c[k * count + m] * x[M > 0 ? m : 0].v[j];
    }
    pack<N>(points) = sum;
  }
}

// grid.y: chunks of `chunk` points, whose coefficients are in shared memory: chunk * count floats
template <int M>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(float* points, const float* states, const float* coefficients, const unsigned char* keep,
                   long long size, int count, int total, int chunk) {
  DYN_SHARED(float, c);
  const int first = blockIdx.y * chunk;
  if (chunk > total - first) chunk = total - first;
  for (int i = threadIdx.x; i < chunk * count; i += kCombineThreads) c[i] = coefficients[(long long)first * count + i];
  __syncthreads();
  points += first * size;
  const long long thread = (long long)blockIdx.x * kCombineThreads + threadIdx.x,
                  threads = (long long)gridDim.x * kCombineThreads;
  const bool packed = size % 4 == 0 && aligned<4>(points) && aligned<4>(states) && (!keep || aligned<4>(keep));
  if (packed)
    for (long long i = 4 * thread; i < size; i += 4 * threads)
      combine_pack<M, 4>(points, states, c, keep, size, count, chunk, i);
  else
    for (long long i = thread; i < size; i += threads)
      combine_pack<M, 1>(points, states, c, keep, size, count, chunk, i);
}

}  // namespace lottery
