// dsa: differentiable siamese augmentation of images [C, H, W], C <= 4, that need no gradient: recoloured, then read
// bilinearly where each image's transform says. Memory bound; an image is read from memory once, its four corners a
// pixel come from cache. Per element: 4 bytes read, 4 written, about 15 operations.
#pragma once
#include "portable.cuh"

namespace lottery {

constexpr int kDsaThreads = 256;

struct DsaColour {
  float brightness, saturation, contrast;
};
struct DsaTransform {  // pixel (row, column) is read at x = a column + b row + c, y = d column + e row + f
  float a, b, c, d, e, f;
};

// The mean of a block's image.
__device__ inline float image_mean(const float* image, int size, float* shared) {
  float sum = 0;
  for (int i = threadIdx.x; i < size; i += kDsaThreads) sum += image[i];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kDsaThreads / 32; ++w) sum += shared[w];
  return sum / float(size);
}

// A recoloured pixel, all channels, times `share`; 0 outside of the image.
template <int channels>
struct DsaReader {
  const float* image;
  int height, width;
  float own, of_grey, rest;

  __device__ void add(int row, int column, float share, float* values) const {
    if (row < 0 || row >= height || column < 0 || column >= width) return;
    const float* pixel = image + row * width + column;
    float grey = 0;
#pragma unroll
    for (int c = 0; c < channels; ++c) grey += pixel[c * height * width];
#pragma unroll
    for (int c = 0; c < channels; ++c) values[c] += share * (own * pixel[c * height * width] + of_grey * grey + rest);
  }
};

// A block an image.
template <int channels>
__global__ void __launch_bounds__(kDsaThreads)
    dsa_kernel(const float* images, const DsaColour* colours, const DsaTransform* transforms, float* results,
               int height, int width) {
  __shared__ float shared[kDsaThreads / 32];
  const int plane = height * width, size = channels * plane;
  const float* image = images + (long long)blockIdx.x * size;
  float* result = results + (long long)blockIdx.x * size;
  const DsaColour by = colours[blockIdx.x];
  const DsaTransform t = transforms[blockIdx.x];
  const float mean = image_mean(image, size, shared), saturation = channels == 1 ? 1.f : by.saturation;
  const DsaReader<channels> reader{image, height, width, by.contrast * saturation,
                         by.contrast * (1 - saturation) / float(channels), (1 - by.contrast) * mean + by.brightness};
  for (int i = threadIdx.x; i < plane; i += kDsaThreads) {
    const float row = float(i / width), column = float(i % width);
    // One pixel beyond the border and further all is 0; an int holds no more of what lies far outside.
    const float x = fminf(fmaxf(t.a * column + t.b * row + t.c, -1.f), float(width));
    const float y = fminf(fmaxf(t.d * column + t.e * row + t.f, -1.f), float(height));
    const int left = int(floorf(x)), top = int(floorf(y));
    const float right = x - float(left), below = y - float(top);
    float values[channels] = {};
    reader.add(top, left, (1 - below) * (1 - right), values);
    reader.add(top, left + 1, (1 - below) * right, values);
    reader.add(top + 1, left, below * (1 - right), values);
    reader.add(top + 1, left + 1, below * right, values);
#pragma unroll
    for (int c = 0; c < channels; ++c) result[c * plane + i] = values[c];
  }
}

}  // namespace lottery
