#include "layout.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace lottery::sparse {
namespace {

// Channels-last activations x [N, C, H, W] in the layout y [B, C, H + 2 halo, W + 2 halo, L], C a multiple of 16; with
// `back` the other way. The lanes after the last image are 0.
void change_layout(const Tensor& x, const Tensor& y, int64_t halo, bool back) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                  x.size(1) % kMaxLanes == 0,
              "activations should be channels-last float32 [N, C, H, W], C a multiple of 16, got ", x.scalar_type(),
              " ", x.sizes());
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), L = lanes(), B = ceil_div(N, L);
  const Layout layout{C, H, W, halo};
  TORCH_CHECK(y.sizes() == layout.sizes(B) && y.scalar_type() == at::kFloat && y.is_contiguous(),
              "blocks should be contiguous float32 ", layout.sizes(B), ", got ", y.scalar_type(), " ", y.sizes());
  std::vector<float> nothing(C * H * W);
  float *images = x.data_ptr<float>(), *blocks = y.data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float *lane[kMaxLanes], *block = blocks + b * C * layout.plane();
      for (int64_t l = 0; l < L; l++) lane[l] = b * L + l < N ? images + (b * L + l) * C * H * W : nothing.data();
      if (back) {
        kernels().separate(layout.grid<const float>(block), lane, C, H, W);
        continue;
      }
      for (int64_t c = 0; c < C; c++) layout.zero_halo(block + c * layout.plane());
      kernels().interleave(lane, C, layout.grid(block), H, W);
    }
  });
}

}  // namespace

Tensor blocked(const Tensor& x, int64_t halo) {
  Tensor y = at::empty({ceil_div(x.size(0), lanes()), x.size(1), x.size(2) + 2 * halo, x.size(3) + 2 * halo, lanes()},
                       x.options());
  change_layout(x, y, halo, false);
  return y;
}

Tensor unblocked(const Tensor& y, int64_t halo, int64_t images) {
  Tensor x = at::empty({images, y.size(1), y.size(2) - 2 * halo, y.size(3) - 2 * halo}, y.options(),
                       at::MemoryFormat::ChannelsLast);
  change_layout(x, y, halo, true);
  return x;
}

}  // namespace lottery::sparse
