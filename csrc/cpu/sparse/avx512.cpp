// Sixteen lanes. Reached only on processors that have the instructions (kernels.cpp asks).
#include "../vector.h"
#include "kernels.h"

#if defined(__x86_64__)
#define LANES 16
#define INSTRUCTION_SET "avx512"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif

namespace lottery::sparse {
namespace avx512_ {
#include "kernels.inc"
}
const Kernels avx512 = avx512_::kernels;
}  // namespace lottery::sparse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
