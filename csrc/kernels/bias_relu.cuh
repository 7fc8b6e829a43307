// bias_relu_: x = relu(x + bias[channel] + shortcut) in place.
// Memory bound. Per float32 element: x read and written, shortcut read, 12 bytes (8 without shortcut); 3 operations.
#pragma once
#include "scalar.cuh"

namespace lottery {

constexpr int kBiasReluThreads = 256;

// N elements from i on. Neighbours share a channel when N divides `inner`, or lie in neighbouring ones when inner is 1.
template <class T, class A, class I, int N>
__device__ inline void bias_relu_pack(T* x, const T* bias, const T* shortcut, I channels, I inner, I i) {
  Pack<T, N> v = pack<N>(x + i), b, s;
  const I channel = i / inner % channels;
  if (inner == 1) b = pack<N>(bias + channel);
  if (shortcut) s = pack<N>(shortcut + i);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    v.v[j] = T(relu(A(v.v[j]) + A(inner == 1 ? b.v[j] : bias[channel]) + (shortcut ? A(s.v[j]) : A(0))));
  }
  pack<N>(x + i) = v;
}

// `inner` elements in a row share a channel: H W of [N, C, H, W], 1 of channels_last. I: type that holds size.
template <class T, class A, class I>
__global__ void __launch_bounds__(kBiasReluThreads)
    bias_relu_kernel(T* x, const T* bias, const T* shortcut, I size, I channels, I inner) {
  constexpr int N = kPack<T>;
  const I thread = I(blockIdx.x) * kBiasReluThreads + threadIdx.x, threads = I(gridDim.x) * kBiasReluThreads;
  const bool packed = (inner == 1 ? channels : inner) % N == 0 && aligned<N>(x) && aligned<N>(shortcut) &&
                      (inner > 1 || aligned<N>(bias));
  if (packed)
    for (I i = thread * N; i < size; i += threads * N)
      bias_relu_pack<T, A, I, N>(x, bias, shortcut, channels, inner, i);
  else
    for (I i = thread; i < size; i += threads) bias_relu_pack<T, A, I, 1>(x, bias, shortcut, channels, inner, i);
}

}  // namespace lottery
