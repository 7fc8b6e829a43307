// Four lanes: what SSE2, NEON and every other processor with 128-bit vectors has.
#include "sparse.h"

#define LANES 4

namespace lottery::sparse {
namespace portable_ {
#include "sparse_kernels.h"
}
const Kernels portable = portable_::kernels;
}  // namespace lottery::sparse
