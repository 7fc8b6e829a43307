// The arithmetic of one element, shared by the CUDA kernels and the CPU loops.
#pragma once
#include "portable.cuh"

namespace lottery {

struct SgdStep {
  float lr, momentum, dampening, weight_decay;
  bool nesterov;
};

// torch.optim.SGD for one weight; a pruned one (keep == 0) and its momentum become exactly 0, whatever they were.
HOST_DEVICE void sgd(float& p, float g, float& m, bool keep, const SgdStep& s) {
  g += s.weight_decay * p;
  const float velocity = s.momentum * m + (1.f - s.dampening) * g;
  const float step = s.nesterov ? g + s.momentum * velocity : velocity;
  m = keep ? velocity : 0.f;
  p = keep ? p - s.lr * step : 0.f;
}

// Whether logit v takes the place of the best one so far, as torch.argmax: the first of equals, and NaN above all.
HOST_DEVICE bool better(float v, float best) { return v > best || (v != v && best == best); }

// NaN passes, as in torch.relu.
template <class A>
HOST_DEVICE A relu(A z) {
  return z < A(0) ? A(0) : z;
}

// Instance norm followed by ReLU, for one element x of a channel with these statistics.
template <class A>
struct Channel {
  A mean, rstd, weight, bias;
  HOST_DEVICE A normal(A x) const { return (x - mean) * rstd; }
  HOST_DEVICE A affine(A x) const { return normal(x) * weight + bias; }
  HOST_DEVICE A forward(A x) const { return relu(affine(x)); }
  // The gradient that reaches the affine output, from the gradient behind the ReLU.
  HOST_DEVICE A through_relu(A x, A grad) const { return affine(x) > A(0) ? grad : A(0); }
  // The gradient of x, from that of the affine output and its two means over the plane: of itself, and times normal(x).
  HOST_DEVICE A backward(A x, A grad, A mean_grad, A mean_grad_normal) const {
    return weight * rstd * (grad - mean_grad - normal(x) * mean_grad_normal);
  }
};

}  // namespace lottery
