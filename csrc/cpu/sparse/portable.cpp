// Four lanes: what SSE2, NEON and every other processor with 128-bit vectors has.
#include "../vector.h"
#include "kernels.h"

#define LANES 4
#define INSTRUCTION_SET "portable"

namespace lottery::sparse {
namespace portable_ {
#include "kernels.inc"
}
const Kernels portable = portable_::kernels;
}  // namespace lottery::sparse
