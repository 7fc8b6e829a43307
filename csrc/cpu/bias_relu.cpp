// bias_relu_: relu(x + bias[channel] + shortcut) in place, in one pass: what follows a convolution with folded
// BatchNorm.
#include <ATen/Parallel.h>

#include "../kernels/scalar.cuh"
#include "ops.h"
#include "vector.h"

namespace lottery {
namespace {

// One run of n elements whose biases lie `stride` apart: 1 along channels, 0 along a plane.
template <class T, int stride>
CLONES void run(T* x, const T* bias, const T* shortcut, int64_t n) {
  using A = Accumulator<T>;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = T(relu(A(x[i]) + A(bias[i * stride]) + (shortcut ? A(shortcut[i]) : A(0))));
  }
}

}  // namespace

void bias_relu_(Tensor x, const Tensor& bias_, const OptionalTensor& shortcut_) {
  check_bias_relu(x, bias_, shortcut_);
  const bool channels_last = !x.is_contiguous();
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor bias = bias_.contiguous(), shortcut = shortcut_ ? shortcut_->contiguous(format) : Tensor();
  if (x.numel() == 0) return;
  const int64_t channels = x.size(1), n = channels_last ? channels : x.size(2) * x.size(3);
  DISPATCH_FLOATING(x.scalar_type(), "bias_relu_", [&] {
    scalar_t* out = x.mutable_data_ptr<scalar_t>();
    const scalar_t* b = bias.const_data_ptr<scalar_t>();
    const scalar_t* s = shortcut.defined() ? shortcut.const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, x.numel() / n, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* added = s ? s + i * n : nullptr;
        if (channels_last)
          run<scalar_t, 1>(out + i * n, b, added, n);
        else
          run<scalar_t, 0>(out + i * n, b + i % channels, added, n);
      }
    });
  });
}

}  // namespace lottery
