// A SparseConv is built once per mask and image size: it lists the surviving weights in the orders in which the three
// passes meet them (lists.cpp). The passes are in sparse_conv.cpp.
#pragma once
#include <ATen/core/ivalue.h>

#include <tuple>
#include <vector>

#include "layout.h"

namespace lottery::sparse {

// Surviving weights in one order: lists of (offset, index into the dense weight).
struct Lists {
  std::vector<int32_t> begin{0};
  std::vector<Weight> weights;
  std::vector<int64_t> index;
  int64_t blocks = 1, rows = 0, sources = 0, ahead = 0;

  void push(int64_t where, int64_t which) {
    weights.push_back({static_cast<int32_t>(where), 0.f});
    index.push_back(which);
  }
  void close() { begin.push_back(static_cast<int32_t>(weights.size())); }
  void read(const float* weight) {
    for (size_t k = 0; k < index.size(); k++) weights[k].value = weight[index[k]];
  }
  Walk walk(int64_t part = 0) const {
    return {begin.data() + part * blocks * rows, weights.data(), blocks, rows, sources, ahead};
  }
};

struct SparseConv : torch::CustomClassHolder {
  int64_t stride, padding;
  std::vector<int64_t> weight_sizes;
  Layout in, out;    // out: the convolution's output; its halo is what the input gradient needs
  int64_t z_plane;   // out without halo, spread
  int64_t dz_plane;  // out with halo, spread
  Lists forward_lists, input_lists;
  std::vector<int32_t> dot_begin{0}, dot_grad, dot_source;
  std::vector<int64_t> dot_index;  // of each slot, into the dense weight, -1 = filler
  std::vector<Dots> dots;
  Tensor z_scratch, dz_scratch;

  SparseConv(const Tensor& mask, int64_t height, int64_t width, int64_t halo, int64_t stride, int64_t padding);

  int64_t positions() const { return out.height * out.width; }
  int64_t nonzero() const { return forward_lists.index.size(); }
  int64_t parts(int64_t blocks) const;
  void check(const Tensor& x) const;
  void convolve(const float* x, float* z, const float* bias, int64_t first, int64_t last) const;

 private:
  int64_t gradient_halo(int64_t size, int64_t out_size, int64_t kernel) const;
  void list_forward(const bool* mask);
  void list_input(const bool* mask);
  void list_dots(const bool* mask);
};

enum Norm { kAffine, kInstance, kBatch };  // scale and shift as given, statistics per image, statistics per batch

// y = pool(relu(norm(conv(x) + bias) + residual)), and what the backward pass wants: z = conv(x) + bias (empty when it
// is cheaper to recompute), mean and rstd [B, O, L], and the variance [O] of the batch.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_forward(
    const c10::intrusive_ptr<SparseConv>& conv, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual, int64_t norm, double eps,
    bool relu, int64_t pool, int64_t halo, int64_t images, bool keep);

// Gradients of x (undefined unless wanted), weight, bias, gamma, beta and residual (undefined without).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const c10::intrusive_ptr<SparseConv>& conv, const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& z,
    const Tensor& mean, const Tensor& rstd, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gamma, const OptionalTensor& beta, bool residual, int64_t norm, bool relu, int64_t pool,
    int64_t halo, int64_t images, bool wants_input);

}  // namespace lottery::sparse
