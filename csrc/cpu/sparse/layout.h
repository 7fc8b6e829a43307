// How sparse training stores activations: [B, C, H, W, L] as kernels.h says, with a halo of zeros around H x W, so that
// no kernel ever tests for a border.
#pragma once
#include <cstring>
#include <vector>

#include "../ops.h"
#include "kernels.h"

namespace lottery::sparse {

constexpr int64_t kMaxLanes = 16;

// A [B, C, H + 2 halo, W + 2 halo, L] tensor.
struct Layout {
  int64_t channels, height, width, halo;

  int64_t row() const { return (width + 2 * halo) * lanes(); }
  int64_t plane() const { return (height + 2 * halo) * row(); }
  int64_t inside() const { return halo * row() + halo * lanes(); }
  std::vector<int64_t> sizes(int64_t blocks) const {
    return {blocks, channels, height + 2 * halo, width + 2 * halo, lanes()};
  }
  template <class T>
  Grid<T> grid(T* data) const {
    return {data + inside(), plane(), row(), lanes()};
  }
  void zero_halo(float* p) const {
    std::memset(p, 0, sizeof(float) * inside());
    for (int64_t y = 0; y < height - 1; y++)
      std::memset(p + (halo + y) * row() + (halo + width) * lanes(), 0, sizeof(float) * 2 * halo * lanes());
    std::memset(p + plane() - inside(), 0, sizeof(float) * inside());
  }
};

// Channels-last activations [N, C, H, W], C a multiple of 16, in this layout; the lanes after the last image are 0.
Tensor blocked(const Tensor& x, int64_t halo);

// The way back.
Tensor unblocked(const Tensor& y, int64_t halo, int64_t images);

}  // namespace lottery::sparse
