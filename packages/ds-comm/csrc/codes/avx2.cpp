// The codes compiled for AVX2: the same operations in the same order, so the same bits.
#include "table.h"

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

#include "blocks.h"
#include "e8.h"

namespace ds_comm {

constexpr Table kAvx2 = {e8_codes(), block_codes()};

}  // namespace ds_comm

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
