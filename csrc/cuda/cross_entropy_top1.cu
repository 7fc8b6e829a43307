// Launcher of cross_entropy_top1. The number of blocks depends on B alone, so a network's sums do not depend on K.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../kernels/cross_entropy_top1.cuh"
#include "launch.h"

namespace lottery {
namespace {

Tensor cross_entropy_top1(const Tensor& logits_, const Tensor& labels_) {
  check_cross_entropy_top1(logits_, labels_);
  const c10::cuda::CUDAGuard guard(logits_.device());
  const Tensor logits = logits_.contiguous(), labels = labels_.contiguous();
  const int64_t networks = logits.size(0), images = logits.size(1), classes = logits.size(2);
  const auto options = logits.options().dtype(at::kDouble);
  if (networks == 0 || images == 0) return at::zeros({networks, 3}, options);
  TORCH_CHECK(networks <= 65535, "cross_entropy_top1: at most 65535 networks at once on a GPU, got ", networks);
  TORCH_CHECK(classes < (int64_t(1) << 31), "cross_entropy_top1: too many classes, ", classes);
  const dim3 grid(std::min(64u, blocks_for(images, kLossWarps)), unsigned(networks));
  const Tensor sums = at::empty({networks, grid.x, 3}, options);
  DISPATCH_FLOAT_OR_LOWER(logits.scalar_type(), "cross_entropy_top1", [&] {
    LAUNCH(cross_entropy_top1_kernel<scalar_t>, grid, 32 * kLossWarps, 0, current_stream(),
           logits.const_data_ptr<scalar_t>(), reinterpret_cast<const long long*>(labels.const_data_ptr<int64_t>()),
           (long long)images, int(classes), sums.mutable_data_ptr<double>());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sums.sum(1);
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) { m.impl("cross_entropy_top1", &lottery::cross_entropy_top1); }
