// Eight lanes. Reached only on processors that have the instructions (kernels.cpp asks).
#include "../vector.h"
#include "kernels.h"

#if defined(__x86_64__)
#define LANES 8
#define INSTRUCTION_SET "avx2"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace lottery::sparse {
namespace avx2_ {
#include "kernels.inc"
}
const Kernels avx2 = avx2_::kernels;
}  // namespace lottery::sparse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
