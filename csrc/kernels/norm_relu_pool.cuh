// norm_relu_pool: instance norm, ReLU and 2x2 average pooling of planes [H, W] of a contiguous [N, C, H, W], and
// backward. Memory bound; a plane is read from memory once, its later looks come from cache. Forward, per element of x
// in float32: 4 bytes read, 1 written, 9 operations. Backward: 4 + 1 read, 4 written, 20 operations.
#pragma once
#include "scalar.cuh"

namespace lottery {

constexpr int kNormThreads = 256;
constexpr int kLargestPlane = 0x7fffffff - kNormThreads * kPack<short>;  // an int counts one step past its end

// Sum over the kThreads threads (a warp, or the whole block) that share a plane.
template <int kThreads, class A>
__device__ inline A plane_sum(A v, A* shared) {
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  if (kThreads > 32) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < kThreads / 32; ++w) v += shared[w];
    __syncthreads();
  }
  return v;
}

// Two rows of 2 N neighbouring elements: N cells of 2x2, each pooled into one.
template <class T, int N>
struct Cells {
  Pack<T, N> row[2][2];

  __device__ void load(const T* x, int width) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) row[i][j] = pack<N>(x + i * width + j * N);
  }
  __device__ void store(T* x, int width) const {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) pack<N>(x + i * width + j * N) = row[i][j];
  }
  __device__ T& at(int cell, int i) {
    return row[i / 2][(2 * cell + i % 2) / N].v[(2 * cell + i % 2) % N];
  }  // i in 0..3
};

// Calls f(offset of the cells in the plane, offset of the first in the pooled plane) for all groups of N cells.
template <int kThreads, int N, class F>
__device__ inline void for_cells(int height, int width, const F& f) {
  const int across = width / 2 / N, count = height / 2 * across;
  for (int i = threadIdx.x % kThreads; i < count; i += kThreads) {
    const int y = i / across, x = i % across * N;
    f(2 * (y * width + x), y * (width / 2) + x);
  }
}

template <int kThreads, int N, class T, class A>
__device__ inline void statistics(const T* x, int size, A eps, A* shared, A& mean, A& rstd) {
  const int thread = threadIdx.x % kThreads;
  A sum = 0, square = 0;
  for (int i = thread * N; i < size; i += kThreads * N) {
    const Pack<T, N> v = pack<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += A(v.v[j]);
  }
  mean = plane_sum<kThreads>(sum, shared) / A(size);
  for (int i = thread * N; i < size; i += kThreads * N) {
    const Pack<T, N> v = pack<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) square += (A(v.v[j]) - mean) * (A(v.v[j]) - mean);
  }
  rstd = A(1) / A(sqrt(plane_sum<kThreads>(square, shared) / A(size) + eps));
}

template <int kThreads, int N, class T, class A>
__device__ inline void pool(const T* x, T* pooled, int height, int width, const Channel<A>& channel) {
  for_cells<kThreads, N>(height, width, [&](int at, int at_pooled) {
    Cells<T, N> cells;
    cells.load(x + at, width);
    Pack<T, N> out;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += channel.forward(A(cells.at(c, i)));
      out.v[c] = T(A(.25) * sum);
    }
    pack<N>(pooled + at_pooled) = out;
  });
}

// A plane belongs to kThreads threads: a warp for small planes, the block for large ones.
template <class T, class A, int kThreads>
__global__ void __launch_bounds__(kNormThreads)
    norm_relu_pool_kernel(const T* x, const A* weight, const A* bias, T* pooled, A* means, A* rstds, long long planes,
                          int channels, int height, int width, A eps) {
  __shared__ A shared[kNormThreads / 32];
  const long long plane = (long long)blockIdx.x * (kNormThreads / kThreads) + threadIdx.x / kThreads;
  if (plane >= planes) return;  // a whole warp, and only where no barrier follows
  constexpr int N = kPack<T>;
  const int size = height * width, channel = int(plane % channels);
  x += plane * size;
  pooled += plane * (height / 2) * (width / 2);
  A mean, rstd;
  if (size % N == 0 && aligned<N>(x))
    statistics<kThreads, N>(x, size, eps, shared, mean, rstd);
  else
    statistics<kThreads, 1>(x, size, eps, shared, mean, rstd);
  const Channel<A> f{mean, rstd, weight[channel], bias[channel]};
  if (width % (2 * N) == 0 && aligned<N>(x) && aligned<N>(pooled))
    pool<kThreads, N>(x, pooled, height, width, f);
  else
    pool<kThreads, 1>(x, pooled, height, width, f);
  if (threadIdx.x % kThreads == 0) {
    means[plane] = mean;
    rstds[plane] = rstd;
  }
}

template <int kThreads, int N, class T, class A>
__device__ inline void backward(const T* grad, const T* x, T* dx, int height, int width, const Channel<A>& channel,
                                A* shared, A& dweight, A& dbias) {
  A sum = 0, sum_normal = 0;
  for_cells<kThreads, N>(height, width, [&](int at, int at_pooled) {
    Cells<T, N> cells;
    cells.load(x + at, width);
    const Pack<T, N> g = pack<N>(grad + at_pooled);
#pragma unroll
    for (int c = 0; c < N; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const A v = A(cells.at(c, i)), through = channel.through_relu(v, A(.25) * A(g.v[c]));
        sum += through;
        sum_normal += through * channel.normal(v);
      }
  });
  dbias = plane_sum<kThreads>(sum, shared);
  dweight = plane_sum<kThreads>(sum_normal, shared);
  const A size = A(height * width), mean_grad = dbias / size, mean_grad_normal = dweight / size;
  for_cells<kThreads, N>(height, width, [&](int at, int at_pooled) {
    Cells<T, N> cells;
    cells.load(x + at, width);
    const Pack<T, N> g = pack<N>(grad + at_pooled);
#pragma unroll
    for (int c = 0; c < N; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const A v = A(cells.at(c, i));
        cells.at(c, i) =
            T(channel.backward(v, channel.through_relu(v, A(.25) * A(g.v[c])), mean_grad, mean_grad_normal));
      }
    cells.store(dx + at, width);
  });
  if (height % 2 || width % 2)  // the last row or column is in no cell
    for (int i = threadIdx.x % kThreads; i < height * width; i += kThreads)
      if (i / width >= height / 2 * 2 || i % width >= width / 2 * 2)
        dx[i] = T(channel.backward(A(x[i]), A(0), mean_grad, mean_grad_normal));
}

// dweight and dbias [N, C]: each plane's share
template <class T, class A, int kThreads>
__global__ void __launch_bounds__(kNormThreads)
    norm_relu_pool_backward_kernel(const T* grad, const T* x, const A* weight, const A* bias, const A* means,
                                   const A* rstds, T* dx, A* dweights, A* dbiases, long long planes, int channels,
                                   int height, int width) {
  __shared__ A shared[kNormThreads / 32];
  const long long plane = (long long)blockIdx.x * (kNormThreads / kThreads) + threadIdx.x / kThreads;
  if (plane >= planes) return;
  constexpr int N = kPack<T>;
  const int size = height * width, channel = int(plane % channels);
  x += plane * size;
  dx += plane * size;
  grad += plane * (height / 2) * (width / 2);
  const Channel<A> f{means[plane], rstds[plane], weight[channel], bias[channel]};
  A dweight, dbias;
  if (width % (2 * N) == 0 && aligned<N>(x) && aligned<N>(dx) && aligned<N>(grad))
    backward<kThreads, N>(grad, x, dx, height, width, f, shared, dweight, dbias);
  else
    backward<kThreads, 1>(grad, x, dx, height, width, f, shared, dweight, dbias);
  if (threadIdx.x % kThreads == 0) {
    dweights[plane] = dweight;
    dbiases[plane] = dbias;
  }
}

}  // namespace lottery
