// combine_: points[k] = sum_m coefficients[k, m] * states[m], zero where keep is false.
// Each slice of the states is read from memory once and serves all K points from cache.
#include <ATen/Parallel.h>

#include "ops.h"
#include "vector.h"

namespace lottery {
namespace {

constexpr int64_t kSlice = 2048;

CLONES void combine_slice(float* point, const float* states, int64_t stride, const float* coefficients, int64_t count,
                          const uint8_t* keep, int64_t n) {
  for (int64_t i = 0; i < n; ++i) point[i] = coefficients[0] * states[i];
  for (int64_t m = 1; m < count; ++m)
    for (int64_t i = 0; i < n; ++i) point[i] += coefficients[m] * states[m * stride + i];
  if (keep)
    for (int64_t i = 0; i < n; ++i) point[i] = keep[i] ? point[i] : 0.f;
}

}  // namespace

void combine_(Tensor points, const Tensor& states_, const Tensor& coefficients_, const OptionalTensor& keep_) {
  check_combine(points, states_, coefficients_, keep_);
  const Tensor states = states_.contiguous(), coefficients = coefficients_.contiguous();
  const Tensor keep = keep_ ? keep_->contiguous() : Tensor();
  const int64_t size = states.size(1), count = states.size(0);
  float* out = points.mutable_data_ptr<float>();
  const float *s = states.const_data_ptr<float>(), *c = coefficients.const_data_ptr<float>();
  const uint8_t* mask = keep.defined() ? bytes(keep) : nullptr;
  at::parallel_for(0, ceil_div(size, kSlice), 1, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * kSlice; start < std::min(end * kSlice, size); start += kSlice)
      for (int64_t k = 0; k < points.size(0); ++k)
        combine_slice(out + k * size + start, s + start, size, c + k * count, count, mask ? mask + start : nullptr,
                      std::min(kSlice, size - start));
  });
}

}  // namespace lottery
