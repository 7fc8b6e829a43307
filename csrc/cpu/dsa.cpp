// dsa: differentiable siamese augmentation of images that need no gradient, an image at a time: recoloured into a scratch
// of four interleaved channels with a border of zeros, then read bilinearly where the image's transform says. 28 bytes
// an element of PyTorch's passes become 8.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../checks.h"
#include "ops.h"
#include "vector.h"

namespace lottery {
namespace {

constexpr int64_t kLanes = 4;  // channels in the scratch

struct Colour {
  float brightness, saturation, contrast;
};
struct Transform {  // pixel (row, column) of the result is read at x = a column + b row + c, y = d column + e row + f
  float a, b, c, d, e, f;
};

// scratch [height + 2, width + 2, 4] = the recoloured image [channels, height, width], zeros around it.
template <int channels>
CLONES void recolour(float* scratch, const float* image, int64_t height, int64_t width, Colour by) {
  const int64_t plane = height * width, row_size = (width + 2) * kLanes;
  float sums[16] = {};
  for (int64_t i = 0; i + 16 <= channels * plane; i += 16)
    for (int lane = 0; lane < 16; ++lane) sums[lane] += image[i + lane];
  for (int64_t i = channels * plane / 16 * 16; i < channels * plane; ++i) sums[0] += image[i];
  float mean = 0;
  for (float sum : sums) mean += sum;
  mean /= float(channels * plane);
  const float saturation = channels == 1 ? 1.f : by.saturation;
  const float own = by.contrast * saturation, of_grey = by.contrast * (1 - saturation) / float(channels);
  const float rest = (1 - by.contrast) * mean + by.brightness;
  std::fill_n(scratch, (height + 2) * row_size, 0.f);
  for (int64_t y = 0; y < height; ++y) {
    float* row = scratch + (y + 1) * row_size + kLanes;
    const float* source = image + y * width;
    for (int64_t x = 0; x < width; ++x) {
      float grey = 0;
      for (int c = 0; c < channels; ++c) grey += source[c * plane + x];
      for (int c = 0; c < channels; ++c) row[x * kLanes + c] = own * source[c * plane + x] + of_grey * grey + rest;
    }
  }
}

// result [height, width, channels], read bilinearly from the scratch; what lies outside is 0.
template <int channels>
CLONES void read_at(float* result, const float* scratch, int64_t height, int64_t width, Transform t) {
  using Pixel = Vec<float, kLanes>;
  const int64_t row_size = (width + 2) * kLanes;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      // One pixel beyond the border and further are all zeros: the border stands for them.
      const float x = std::min(std::max(t.a * float(j) + t.b * float(i) + t.c + 1.f, 0.f), float(width + 1));
      const float y = std::min(std::max(t.d * float(j) + t.e * float(i) + t.f + 1.f, 0.f), float(height + 1));
      const int64_t left = std::min(int64_t(x), width), top = std::min(int64_t(y), height);
      const float right = x - float(left), below = y - float(top);
      const float* corner = scratch + top * row_size + left * kLanes;
      const Pixel upper = vec<kLanes>(corner) * (1 - right) + vec<kLanes>(corner + kLanes) * right;
      const Pixel lower = vec<kLanes>(corner + row_size) * (1 - right) + vec<kLanes>(corner + row_size + kLanes) * right;
      const Pixel value = upper * (1 - below) + lower * below;
      float* pixel = result + (i * width + j) * channels;
      for (int c = 0; c < channels; ++c) pixel[c] = value[c];
    }
  }
}

template <int channels>
void augment(float* result, const float* images, const Colour* colours, const Transform* transforms, int64_t count,
             int64_t height, int64_t width) {
  const int64_t size = channels * height * width;
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch((height + 2) * (width + 2) * kLanes);
    for (int64_t n = begin; n < end; ++n) {
      recolour<channels>(scratch.data(), images + n * size, height, width, colours[n]);
      read_at<channels>(result + n * size, scratch.data(), height, width, transforms[n]);
    }
  });
}

}  // namespace

Tensor dsa(const Tensor& images_, const Tensor& colour_, const Tensor& transform_) {
  check_dsa(images_, colour_, transform_);
  const Tensor images = images_.contiguous(), colour = colour_.contiguous(), transform = transform_.contiguous();
  Tensor result = empty_channels_last(images, images.sizes());
  constexpr std::array run{augment<1>, augment<2>, augment<3>, augment<4>};
  run[images.size(1) - 1](result.mutable_data_ptr<float>(), images.const_data_ptr<float>(),
                          reinterpret_cast<const Colour*>(colour.const_data_ptr<float>()),
                          reinterpret_cast<const Transform*>(transform.const_data_ptr<float>()), images.size(0),
                          images.size(2), images.size(3));
  return result;
}

}  // namespace lottery
