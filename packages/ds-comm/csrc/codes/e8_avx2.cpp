// The E8 code compiled for AVX2: the same operations in the same order, so the same bits.
#include "e8_table.h"

#if defined(DS_COMM_X86)

// Before the pragma: functions of the standard library must not be compiled for these instructions, because the linker
// may keep this copy for the whole module.
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include "e8.h"

namespace ds_comm {

constexpr E8Table kAvx2E8 = e8_table();

}  // namespace ds_comm

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
