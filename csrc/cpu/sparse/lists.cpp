// The lists of a SparseConv: which weights each pass meets, in which order.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "sparse_conv.h"

namespace lottery::sparse {
namespace {

constexpr int64_t kWorthwhile = 24;  // weights in a list, for which its sums are loaded and stored
constexpr int64_t kGradParts = 8;    // at least, of a weight gradient, for as many threads

// Planes an odd number of cache lines apart do not compete for the same sets of the first-level cache.
int64_t spread(int64_t floats) { return (ceil_div<int64_t>(floats, 16) | 1) * 16; }

// For a tile of the source: three quarters of the first-level data cache that the system says it has, else of 32 KB.
int64_t first_level_bytes() {
  long size = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
  return (size > 0 ? size : 32 << 10) / 4 * 3;
}

// Source channels per block: a tile of them fits the first-level cache, yet lists are not too short to be worth it.
// No sum depends on it: blocks are met in the order of the channels.
int64_t channels_per_block(int64_t channels, int64_t tile, double weights_per_channel) {
  const int64_t fit = first_level_bytes() / (tile * lanes() * sizeof(float));
  const int64_t worth = weights_per_channel > 0 ? std::ceil(kWorthwhile / weights_per_channel) : channels;
  const int64_t most = std::min(channels, std::max({fit, worth, int64_t(1)}));
  return ceil_div(channels, ceil_div(channels, most));  // blocks of equal size
}

}  // namespace

SparseConv::SparseConv(const Tensor& mask, int64_t height, int64_t width, int64_t halo, int64_t stride,
                       int64_t padding)
    : stride(stride), padding(padding) {
  TORCH_CHECK(mask.dim() == 4 && mask.scalar_type() == at::kBool && mask.device().is_cpu(),
              "mask should be a 4d bool tensor on the CPU, got ", mask.dim(), "d ", mask.scalar_type());
  TORCH_CHECK(stride == 1 || stride == 2, "stride should be 1 or 2, got ", stride);
  TORCH_CHECK(0 <= padding && padding <= halo, "padding should be between 0 and the halo ", halo, ", got ", padding);
  weight_sizes = mask.sizes().vec();
  const int64_t O = mask.size(0), C = mask.size(1), KH = mask.size(2), KW = mask.size(3);
  in = {C, height, width, halo};
  out = {O, (height + 2 * padding - KH) / stride + 1, (width + 2 * padding - KW) / stride + 1, 0};
  TORCH_CHECK(out.height > 0 && out.width > 0 && height + 2 * padding >= KH && width + 2 * padding >= KW,
              "a ", KH, " x ", KW, " kernel does not fit ", height, " x ", width, " images with padding ", padding);
  out.halo = gradient_halo(height, out.height, KH);
  out.halo = std::max(out.halo, gradient_halo(width, out.width, KW));
  z_plane = spread(out.height * out.width * lanes());
  dz_plane = spread(out.plane());
  TORCH_CHECK(std::max({C * in.plane(), O * dz_plane, mask.numel()}) < std::numeric_limits<int32_t>::max(),
              "layer too large: ", C, " channels of ", height, " x ", width);
  const Tensor kept = mask.contiguous();
  list_forward(kept.data_ptr<bool>());
  list_input(kept.data_ptr<bool>());
  list_dots(kept.data_ptr<bool>());
}

// Input position stride * i + p receives the output positions i + (p + padding - k) / stride.
int64_t SparseConv::gradient_halo(int64_t size, int64_t out_size, int64_t kernel) const {
  int64_t halo = 0;
  for (int64_t p = 0; p < stride; p++)
    for (int64_t k = 0; k < kernel; k++) {
      if ((p + padding - k) % stride) continue;
      const int64_t shift = (p + padding - k) / stride, last = ceil_div(size - p, stride) - 1;
      halo = std::max({halo, -shift, last + shift - (out_size - 1)});
    }
  return halo;
}

void SparseConv::list_forward(const bool* mask) {
  const int64_t O = out.channels, C = in.channels, KH = weight_sizes[2], KW = weight_sizes[3];
  const int64_t tile = KH * (7 * stride + KW), start = (in.halo - padding) * (in.row() + lanes());
  const int64_t n = std::count(mask, mask + O * C * KH * KW, true);
  const int64_t step = channels_per_block(C, tile, double(n) / (O * C));
  Lists& lists = forward_lists;
  lists.blocks = ceil_div(C, step), lists.rows = O;
  lists.sources = C, lists.ahead = start + KH * in.row();
  for (int64_t block = 0; block < C; block += step)
    for (int64_t o = 0; o < O; o++, lists.close())
      for (int64_t c = block; c < std::min(C, block + step); c++)
        for (int64_t k = 0; k < KH * KW; k++)
          if (mask[(o * C + c) * KH * KW + k])
            lists.push(start + c * in.plane() + k / KW * in.row() + k % KW * lanes(), (o * C + c) * KH * KW + k);
}

// One set of lists for each parity of the input position.
void SparseConv::list_input(const bool* mask) {
  const int64_t O = out.channels, C = in.channels, KH = weight_sizes[2], KW = weight_sizes[3];
  const int64_t tile = KH * (7 + KW);
  const int64_t step = channels_per_block(O, tile, double(forward_lists.index.size()) / (O * C * stride * stride));
  Lists& lists = input_lists;
  lists.blocks = ceil_div(O, step), lists.rows = C;
  lists.sources = O, lists.ahead = (2 * out.halo + 1) * out.row();
  for (int64_t py = 0; py < stride; py++)
    for (int64_t px = 0; px < stride; px++)
      for (int64_t block = 0; block < O; block += step)
        for (int64_t c = 0; c < C; c++, lists.close())
          for (int64_t o = block; o < std::min(O, block + step); o++)
            for (int64_t k = 0; k < KH * KW; k++) {
              const int64_t y = py + padding - k / KW, x = px + padding - k % KW;
              if (y % stride == 0 && x % stride == 0 && mask[(o * C + c) * KH * KW + k])
                lists.push(o * dz_plane + out.inside() + y / stride * out.row() + x / stride * lanes(),
                           (o * C + c) * KH * KW + k);
            }
}

// A list for each output channel, per block of input channels; parts of so many output channels that all threads have
// work.
void SparseConv::list_dots(const bool* mask) {
  const int64_t O = out.channels, C = in.channels, KH = weight_sizes[2], KW = weight_sizes[3];
  const int64_t start = (in.halo - padding) * (in.row() + lanes()), tile = (stride + KH) * (7 * stride + KW);
  const int64_t step = channels_per_block(C, tile, double(nonzero()) / (O * C));
  const int64_t part = ceil_div(O, ceil_div(kGradParts, ceil_div(C, step)));
  auto push = [&](int64_t source, int64_t index) {
    dot_source.push_back(static_cast<int32_t>(source));
    dot_index.push_back(index);
  };
  for (int64_t block = 0; block < C; block += step) {
    const int64_t end = std::min(C, block + step);
    for (int64_t first = 0; first < O; first += part) {
      const int64_t last = std::min(O, first + part), lists = dot_grad.size();
      for (int64_t o = first; o < last; o++) {
        for (int64_t c = block; c < end; c++)
          for (int64_t k = 0; k < KH * KW; k++)
            if (mask[(o * C + c) * KH * KW + k])
              push(start + c * in.plane() + k / KW * in.row() + k % KW * lanes(), (o * C + c) * KH * KW + k);
        while (dot_index.size() % 4) push(start, -1);
        dot_grad.push_back(static_cast<int32_t>(o * dz_plane + out.inside()));
        dot_begin.push_back(static_cast<int32_t>(dot_index.size()));
      }
      const int64_t ahead = start + block * in.plane() + (stride + KH) * in.row();
      dots.push_back({nullptr, nullptr, nullptr, lists, lists + last - first, end - block, in.plane(), ahead});
    }
  }
  for (Dots& d : dots) d.begin = dot_begin.data(), d.grad = dot_grad.data(), d.source = dot_source.data();
}

}  // namespace lottery::sparse
