// What the launchers share: the current device's stream, the launch check, 16-bit types.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"

namespace lottery {

constexpr int64_t kBlocksX = 0x7fffffff;  // blocks that a grid's x takes

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Blocks for `work` items at `per_block`, no more than fill a GPU several times over: the kernels stride.
inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return unsigned(std::max<int64_t>(1, std::min<int64_t>(ceil_div(work, per_block), 1 << 14)));
}

}  // namespace lottery
