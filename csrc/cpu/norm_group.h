// Instance norm, ReLU and 2x2 average pooling of one image's group of n <= kGroup channels, with channels innermost:
// element (position p, channel c) of the activation lies at x[p * pitch + c]. Inlined into the CLONES that call them,
// with n a constant for whole groups so that the inner loops become a few vector instructions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../kernels/scalar.cuh"
#include "vector.h"

namespace lottery {

constexpr int kGroup = 16, kVec = kGroup / 2;  // channels in a group, in a vector

struct Plane {
  int64_t height, width;
  int64_t size() const { return height * width; }
  int64_t pooled_size() const { return height / 2 * (width / 2); }
};

template <class A>
struct Affine {  // per channel
  const A *weight, *bias;
};

// total[c] = sum over positions of f(p, c), in two parts, so that an addition need not wait for the one before.
template <class A, class F>
INLINE void sum_over(int64_t size, int n, A* total, const F& f) {
  A even[kGroup] = {}, odd[kGroup] = {};
  for (int64_t p = 0; p + 1 < size; p += 2) {
    for (int c = 0; c < n; ++c) even[c] += f(p, c);
    for (int c = 0; c < n; ++c) odd[c] += f(p + 1, c);
  }
  if (size % 2)
    for (int c = 0; c < n; ++c) even[c] += f(size - 1, c);
  for (int c = 0; c < n; ++c) total[c] = even[c] + odd[c];
}

template <class T, class A>
INLINE void statistics(const T* x, int64_t pitch, Plane plane, int n, A eps, A* mean, A* rstd) {
  const int64_t size = plane.size();
  A sum[kGroup], square[kGroup];
  sum_over(size, n, sum, [&](int64_t p, int c) INLINE_LAMBDA { return A(x[p * pitch + c]); });
  for (int c = 0; c < n; ++c) mean[c] = sum[c] / A(size);
  sum_over(size, n, square, [&](int64_t p, int c) INLINE_LAMBDA {
    const A d = A(x[p * pitch + c]) - mean[c];
    return d * d;
  });
  for (int c = 0; c < n; ++c) rstd[c] = A(1) / std::sqrt(square[c] / A(size) + eps);
}

template <class T, class U, class A>
INLINE void normalise_and_pool(const T* x, int64_t pitch, Plane plane, int n, const A* mean, const A* rstd,
                               Affine<A> affine, U* pooled, int64_t pooled_pitch) {
  for (int64_t i = 0; i < plane.height / 2; ++i)
    for (int64_t j = 0; j < plane.width / 2; ++j, pooled += pooled_pitch) {
      const T *upper = x + (2 * i * plane.width + 2 * j) * pitch, *lower = upper + plane.width * pitch;
      for (int c = 0; c < n; ++c) {
        const Channel<A> f{mean[c], rstd[c], affine.weight[c], affine.bias[c]};
        pooled[c] = U(A(.25) * (f.forward(A(upper[c])) + f.forward(A(upper[pitch + c])) + f.forward(A(lower[c])) +
                                f.forward(A(lower[pitch + c]))));
      }
    }
}

// dx may be x itself. dweight and dbias are set to this image's share.
template <class T, class U, class A>
INLINE void pool_and_norm_backward(const U* grad, int64_t grad_pitch, const T* x, T* dx, int64_t pitch, Plane plane,
                                   int n, const A* mean, const A* rstd, Affine<A> affine, A* dweight, A* dbias) {
  const int64_t half_height = plane.height / 2, half_width = plane.width / 2;
  A sum[kGroup] = {}, sum_normal[kGroup] = {};
  for (int64_t i = 0; i < half_height; ++i)
    for (int64_t j = 0; j < half_width; ++j) {
      const T *upper = x + (2 * i * plane.width + 2 * j) * pitch, *lower = upper + plane.width * pitch;
      const U* cell = grad + (i * half_width + j) * grad_pitch;
      for (int c = 0; c < n; ++c) {
        const Channel<A> f{mean[c], rstd[c], affine.weight[c], affine.bias[c]};
        const A share = A(.25) * A(cell[c]), x0 = A(upper[c]), x1 = A(upper[pitch + c]), x2 = A(lower[c]),
                x3 = A(lower[pitch + c]);
        const A g0 = f.through_relu(x0, share), g1 = f.through_relu(x1, share), g2 = f.through_relu(x2, share),
                g3 = f.through_relu(x3, share);
        sum[c] += g0 + g1 + g2 + g3;
        sum_normal[c] += g0 * f.normal(x0) + g1 * f.normal(x1) + g2 * f.normal(x2) + g3 * f.normal(x3);
      }
    }
  const A size = A(plane.size());
  for (int c = 0; c < n; ++c) {
    dbias[c] = sum[c];
    dweight[c] = sum_normal[c];
    sum[c] /= size;
    sum_normal[c] /= size;
  }
  for (int64_t y = 0; y < plane.height; ++y)
    for (int64_t z = 0; z < plane.width; ++z, x += pitch, dx += pitch) {
      const bool pooled = y / 2 < half_height && z / 2 < half_width;  // an odd last row or column is in no cell
      const U* cell = grad + (pooled ? (y / 2 * half_width + z / 2) * grad_pitch : 0);
      const A share = pooled ? A(.25) : A(0);
      for (int c = 0; c < n; ++c) {
        const Channel<A> f{mean[c], rstd[c], affine.weight[c], affine.bias[c]};
        const A value = A(x[c]);
        dx[c] = T(f.backward(value, f.through_relu(value, share * A(cell[c])), sum[c], sum_normal[c]));
      }
    }
}

}  // namespace lottery
