// Kernels for what every processor of the family has. On x86-64 that is SSE2, where a fused multiply-add is a
// call into the C library: slow, and still correctly rounded. Elsewhere (ARM) it is full speed.
#include "make_table.h"

namespace ds_kernels {

constexpr KernelTable kScalarKernels = DS_KERNELS_TABLE("scalar");

}  // namespace ds_kernels
