// cross_entropy_top1: for each of K networks, the sums over images of loss and squared loss, and the correct count.
#include <ATen/Parallel.h>

#include <cmath>

#include "../kernels/scalar.cuh"
#include "ops.h"

namespace lottery {
namespace {

template <class T>
void add_image(const T* logits, int64_t classes, int64_t label, double* sums) {
  int64_t top = 0;
  for (int64_t c = 1; c < classes; ++c)
    if (better(float(logits[c]), float(logits[top]))) top = c;
  const double highest = float(logits[top]);
  double total = 0;
  for (int64_t c = 0; c < classes; ++c) total += std::exp(float(logits[c]) - highest);
  const double loss = std::log(total) + highest - float(logits[label]);
  sums[0] += loss;
  sums[1] += loss * loss;
  sums[2] += top == label;
}

}  // namespace

Tensor cross_entropy_top1(const Tensor& logits_, const Tensor& labels_) {
  check_cross_entropy_top1(logits_, labels_);
  const Tensor logits = logits_.contiguous(), labels = labels_.contiguous();
  const int64_t images = logits.size(1), classes = logits.size(2);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < images; ++b)
    TORCH_CHECK(label[b] >= 0 && label[b] < classes, "cross_entropy_top1: label ", label[b], " at ", b, " with ",
                classes, " classes");
  Tensor sums = logits.new_zeros({logits.size(0), 3}, at::kDouble);
  double* out = sums.mutable_data_ptr<double>();
  DISPATCH_FLOAT_OR_LOWER(logits.scalar_type(), "cross_entropy_top1", [&] {
    const scalar_t* x = logits.const_data_ptr<scalar_t>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {  // a network's sum has one order
      for (int64_t k = begin; k < end; ++k)
        for (int64_t b = 0; b < images; ++b) add_image(x + (k * images + b) * classes, classes, label[b], out + 3 * k);
    });
  });
  return sums;
}

}  // namespace lottery
