// masked_sgd_: one launch updates up to kSgdTensors tensors of any sizes.
// Memory bound. Per float32 weight: param and momentum read and written, grad and mask read, 21 bytes (bfloat16: 15);
// 7 floating-point operations.
#pragma once
#include "scalar.cuh"

namespace lottery {

constexpr int kSgdTensors = 88, kSgdThreads = 256, kSgdBlock = 4096;  // elements a block updates

template <class T>
struct SgdTensors {  // kernel arguments are at most 4 KB
  T* param[kSgdTensors];
  const T* grad[kSgdTensors];
  float* momentum[kSgdTensors];
  const unsigned char* mask[kSgdTensors];  // or null
  long long size[kSgdTensors];
  unsigned first_block[kSgdTensors + 1];  // of the grid; ends with the number of blocks
  int count;
};

// `lr` lies on the device, so that a captured step can be replayed with another; step.lr is not read.
template <class T>
__global__ void __launch_bounds__(kSgdThreads)
    masked_sgd_kernel(const __grid_constant__ SgdTensors<T> tensors, SgdStep step, const float* lr) {
  step.lr = *lr;
  int low = 0, high = tensors.count;  // the tensor of this block: first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  const long long start = (long long)(blockIdx.x - tensors.first_block[low]) * kSgdBlock;
  const long long left = tensors.size[low] - start;
  const int n = left < kSgdBlock ? int(left) : kSgdBlock;
  T* p = tensors.param[low] + start;
  const T* g = tensors.grad[low] + start;
  float* m = tensors.momentum[low] + start;
  const unsigned char* mask = tensors.mask[low] ? tensors.mask[low] + start : nullptr;

  constexpr int N = kPack<T>;
  int done = 0;
  if (aligned<N>(p) && aligned<N>(g) && aligned<N>(m) && (!mask || aligned<N>(mask))) {
    done = n / N * N;
    for (int i = threadIdx.x * N; i < done; i += kSgdThreads * N) {
      Pack<T, N> ps = pack<N>(p + i);
      const Pack<T, N> gs = pack<N>(g + i);
      Pack<float, N> ms = pack<N>(m + i);
      Pack<unsigned char, N> keep;
      if (mask) keep = pack<N>(mask + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float q = float(ps.v[j]);
        sgd(q, float(gs.v[j]), ms.v[j], mask ? keep.v[j] != 0 : true, step);
        ps.v[j] = T(q);
      }
      pack<N>(p + i) = ps;
      pack<N>(m + i) = ms;
    }
  }
  for (int i = done + threadIdx.x; i < n; i += kSgdThreads) {
    float q = float(p[i]), v = m[i];
    sgd(q, float(g[i]), v, mask ? mask[i] != 0 : true, step);
    p[i] = T(q);
    m[i] = v;
  }
}

}  // namespace lottery
