// Which instruction set the sparse kernels use.
#include "kernels.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace lottery::sparse {

const Kernels& choose_kernels() {
  const char* forced = std::getenv("LOTTERY_SPARSE_ISA");
  const std::string isa = forced ? forced : "";
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (has_avx512 && (isa.empty() || isa == "avx512")) return avx512;
  if (has_avx2 && (isa.empty() || isa == "avx2")) return avx2;
#endif
  TORCH_CHECK(isa.empty() || isa == "portable", "LOTTERY_SPARSE_ISA=", isa,
              ": this processor has no such instructions");
  return portable;
}

}  // namespace lottery::sparse
