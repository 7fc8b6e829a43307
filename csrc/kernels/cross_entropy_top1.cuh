// cross_entropy_top1: loss, squared loss and top-1 hit of each image and network, summed by block.
// Reads logits and labels once (4 K B C + 8 B bytes for float32; the row's second look comes from cache), about 3
// operations and an exponential a logit. Written: three doubles a block.
#pragma once
#include "scalar.cuh"

namespace lottery {

constexpr int kLossWarps = 8;

// One warp an image; grid (blocks, K). sums [K, blocks, 3]. A label outside of [0, C) makes the loss NaN.
template <class T>
__global__ void __launch_bounds__(32 * kLossWarps, 4)
    cross_entropy_top1_kernel(const T* logits, const long long* labels, long long images, int classes, double* sums) {
  __shared__ double shared[kLossWarps][3];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double loss_sum = 0, square_sum = 0;
  int correct = 0;
  for (long long b = (long long)blockIdx.x * kLossWarps + warp; b < images; b += (long long)gridDim.x * kLossWarps) {
    const T* row = logits + (blockIdx.y * images + b) * classes;
    float best = -INFINITY;
    int top = classes;  // no class yet
    for (int c = lane; c < classes; c += 32) {
      const float v = float(row[c]);
      if (top == classes || better(v, best)) best = v, top = c;
    }
    for (int step = 16; step; step /= 2) {
      const float v = __shfl_xor_sync(~0u, best, step);
      const int c = __shfl_xor_sync(~0u, top, step);
      const bool equal = v == best || (v != v && best != best);
      if (better(v, best) || (equal && c < top)) best = v, top = c;
    }
    float total = 0;
    for (int c = lane; c < classes; c += 32) total += expf(float(row[c]) - best);
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    const long long label = labels[b];
    const bool valid = label >= 0 && label < classes;
    const double loss = valid ? double(logf(total)) + best - float(row[label]) : NAN;
    loss_sum += loss;
    square_sum += loss * loss;
    correct += top == label;
  }
  if (lane == 0) {
    shared[warp][0] = loss_sum;
    shared[warp][1] = square_sum;
    shared[warp][2] = correct;
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    double sum = 0;
    for (int w = 0; w < kLossWarps; ++w) sum += shared[w][threadIdx.x];
    sums[((long long)blockIdx.y * gridDim.x + blockIdx.x) * 3 + threadIdx.x] = sum;
  }
}

}  // namespace lottery
