// norm_relu_pool of channels_last images [N, H, W, C], and backward. Memory bound, bytes and operations as those of
// norm_relu_pool.cuh; an image's group of channels is read from memory once, its later looks come from cache.
#pragma once
#include "scalar.cuh"

namespace lottery {

constexpr int kLastThreads = 256, kLastLanes = 8, kLastRows = kLastThreads / kLastLanes;  // of a block, a pixel

// Whether N channels at a time can be taken of all tensors, whose images' channels lie in `groups`.
template <int N, class T>
HOST_DEVICE bool takes_packs(int channels, int groups, const T* x, const T* pooled, const T* dx) {
  return channels / groups % N == 0 && aligned<N>(x) && aligned<N>(pooled) && aligned<N>(dx);
}

// The image and the first of N channels that a thread works on; threads beyond the last channel only wait for others.
template <int N>
struct Lane {
  long long image;
  int channel, row;
  bool inside;

  __device__ Lane(int channels) {
    const int across = (channels + kLastLanes * N - 1) / (kLastLanes * N);
    image = blockIdx.x / across;
    channel = (blockIdx.x % across * kLastLanes + threadIdx.x % kLastLanes) * N;
    row = threadIdx.x / kLastLanes;
    inside = channel < channels;
  }
};

// Sums of v over the threads of a block that share their channels.
template <int N, class A>
__device__ inline void channel_sums(A* v, A* shared) {
  const int warp = threadIdx.x / 32, first = threadIdx.x % kLastLanes * N;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    for (int step = 16; step >= kLastLanes; step /= 2) v[j] += __shfl_xor_sync(~0u, v[j], step);
    if (threadIdx.x % 32 < kLastLanes) shared[warp * kLastLanes * N + first + j] = v[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) {
    v[j] = 0;
    for (int w = 0; w < kLastThreads / 32; ++w) v[j] += shared[w * kLastLanes * N + first + j];
  }
  __syncthreads();
}

// Calls f(the number of a 2x2 cell, its upper left pixel) for all cells of a thread.
template <class F>
__device__ inline void for_last_cells(int row, int height, int width, const F& f) {
  for (int cell = row; cell < height / 2 * (width / 2); cell += kLastRows)
    f(cell, cell / (width / 2) * 2 * width + cell % (width / 2) * 2);
}

// pooled [groups, N, H / 2, W / 2, C / groups], means and rstds [N, C]; N channels a thread, all in one group
template <class T, class A, int N>
__global__ void __launch_bounds__(kLastThreads)
    norm_relu_pool_last_kernel(const T* x, const A* weight, const A* bias, T* pooled, A* means, A* rstds,
                               long long images, int channels, int groups, int height, int width, A eps) {
  __shared__ A shared[kLastThreads / 32 * kLastLanes * N];
  const Lane<N> lane(channels);
  const int size = lane.inside ? height * width : 0, cells = height / 2 * (width / 2), of_group = channels / groups;
  x += lane.image * height * width * channels + lane.channel;
  A mean[N] = {}, rstd[N] = {};
  for (int i = lane.row; i < size; i += kLastRows) {
    const Pack<T, N> v = pack<N>(x + i * channels);
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] += A(v.v[j]);
  }
  channel_sums<N>(mean, shared);
#pragma unroll
  for (int j = 0; j < N; ++j) mean[j] /= A(height * width);
  for (int i = lane.row; i < size; i += kLastRows) {
    const Pack<T, N> v = pack<N>(x + i * channels);
#pragma unroll
    for (int j = 0; j < N; ++j) rstd[j] += (A(v.v[j]) - mean[j]) * (A(v.v[j]) - mean[j]);
  }
  channel_sums<N>(rstd, shared);
  if (!lane.inside) return;
  Channel<A> f[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    rstd[j] = A(1) / A(sqrt(rstd[j] / A(height * width) + eps));
    f[j] = {mean[j], rstd[j], weight[lane.channel + j], bias[lane.channel + j]};
    if (lane.row == 0) {
      means[lane.image * channels + lane.channel + j] = mean[j];
      rstds[lane.image * channels + lane.channel + j] = rstd[j];
    }
  }
  pooled += (lane.channel / of_group * images + lane.image) * cells * of_group + lane.channel % of_group;
  for_last_cells(lane.row, height, width, [&](int cell, int at) {
    A sum[N] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pack<T, N> v = pack<N>(x + (at + i / 2 * width + i % 2) * channels);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += f[j].forward(A(v.v[j]));
    }
    Pack<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.v[j] = T(A(.25) * sum[j]);
    pack<N>(pooled + cell * of_group) = out;
  });
}

// dweights and dbiases [N, C]: each image's share
template <class T, class A, int N>
__global__ void __launch_bounds__(kLastThreads)
    norm_relu_pool_last_backward_kernel(const T* grad, const T* x, const A* weight, const A* bias, const A* means,
                                        const A* rstds, T* dx, A* dweights, A* dbiases, int channels, int height,
                                        int width) {
  __shared__ A shared[kLastThreads / 32 * kLastLanes * N];
  const Lane<N> lane(channels);
  const long long at_image = lane.image * height * width * channels + lane.channel;
  x += at_image;
  dx += at_image;
  grad += lane.image * (height / 2) * (width / 2) * channels + lane.channel;
  Channel<A> f[N] = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const long long at = lane.image * channels + lane.channel + j;
    if (lane.inside) f[j] = {means[at], rstds[at], weight[lane.channel + j], bias[lane.channel + j]};
  }
  A sum[N] = {}, sum_normal[N] = {};
  for_last_cells(lane.row, lane.inside ? height : 0, width, [&](int cell, int at) {
    const Pack<T, N> g = pack<N>(grad + cell * channels);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pack<T, N> v = pack<N>(x + (at + i / 2 * width + i % 2) * channels);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A through = f[j].through_relu(A(v.v[j]), A(.25) * A(g.v[j]));
        sum[j] += through;
        sum_normal[j] += through * f[j].normal(A(v.v[j]));
      }
    }
  });
  channel_sums<N>(sum, shared);
  channel_sums<N>(sum_normal, shared);
  if (!lane.inside) return;
  if (lane.row == 0)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      dweights[lane.image * channels + lane.channel + j] = sum_normal[j];
      dbiases[lane.image * channels + lane.channel + j] = sum[j];
    }
  const A size = A(height * width);
  for (int i = lane.row; i < height * width; i += kLastRows) {
    const int row = i / width / 2, column = i % width / 2;
    const bool in_cell = row < height / 2 && column < width / 2;  // the last row or column may be in none
    Pack<T, N> g = {}, v = pack<N>(x + i * channels);
    if (in_cell) g = pack<N>(grad + (row * (width / 2) + column) * channels);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A own = A(v.v[j]), through = in_cell ? f[j].through_relu(own, A(.25) * A(g.v[j])) : A(0);
      v.v[j] = T(f[j].backward(own, through, sum[j] / size, sum_normal[j] / size));
    }
    pack<N>(dx + i * channels) = v;
  }
}

}  // namespace lottery
