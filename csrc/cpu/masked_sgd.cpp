// masked_sgd_: weight decay, momentum and mask of all parameters in one pass over memory.
// Bytes moved per float32 weight: param and momentum read and written, grad and mask read: 21 (20 without a mask).
#include <ATen/Parallel.h>

#include "../kernels/scalar.cuh"
#include "ops.h"
#include "vector.h"

namespace lottery {
namespace {

constexpr int64_t kChunk = 8192;

template <class T>
CLONES void update(T* __restrict p, const T* __restrict g, float* __restrict m, const uint8_t* __restrict mask,
                   int64_t n, const SgdStep step) {
  const auto pass = [&](auto keep) INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) {
      float q = float(p[i]), v = m[i];
      sgd(q, float(g[i]), v, keep(i), step);
      p[i] = T(q);
      m[i] = v;
    }
  };
  if (mask)
    pass([&](int64_t i) INLINE_LAMBDA { return mask[i] != 0; });
  else
    pass([](int64_t) INLINE_LAMBDA { return true; });
}

}  // namespace

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momenta,
                 at::ArrayRef<OptionalTensor> masks, const Tensor& lr, double momentum, double dampening,
                 double weight_decay, bool nesterov) {
  const auto tensors = check_masked_sgd(params, grads, momenta, masks, lr);
  const SgdStep step{lr.item<float>(), float(momentum), float(dampening), float(weight_decay), nesterov};
  std::vector<int64_t> first_chunk{0};
  for (const auto& t : tensors) first_chunk.push_back(first_chunk.back() + ceil_div(t.param.numel(), kChunk));
  at::parallel_for(0, first_chunk.back(), 8, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (chunk == first_chunk[i + 1]) ++i;
      const SgdTensor& t = tensors[i];
      const int64_t start = (chunk - first_chunk[i]) * kChunk, n = std::min(kChunk, t.param.numel() - start);
      DISPATCH_FLOAT_OR_LOWER(t.param.scalar_type(), "masked_sgd_", [&] {
        update(t.param.mutable_data_ptr<scalar_t>() + start, t.grad.const_data_ptr<scalar_t>() + start,
               t.momentum.mutable_data_ptr<float>() + start, t.mask.defined() ? bytes(t.mask) + start : nullptr, n,
               step);
      });
    }
  });
  copy_back(tensors);
}

}  // namespace lottery
