// Which rows are summed together: the part of the fixed order of column sums that does not depend on threads.
//
// [Note: Column sums]
// The gradient of a bias or a weight is a sum over rows. Rows are added one after another in blocks of kRowBlock, blocks
// along the tree of tree_sum.h. So every number of threads gives the same bits, and a sum passes through some 30
// roundings however many rows there are, fewer than torch's. Sums are float32, rounded once at the end. The blocks' sums
// cost 1/16 of the memory of the rows in float32.
#pragma once

#include <cstddef>

namespace ds_kernels {

constexpr std::size_t kRowBlock = 16;

}  // namespace ds_kernels
