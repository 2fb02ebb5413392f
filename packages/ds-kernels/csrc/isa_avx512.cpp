// Kernels compiled for AVX-512 (F, BW, DQ, VL).
#include "kernel_table.h"

#if defined(DS_KERNELS_X86)

// Before the pragma: functions of the standard library must not be compiled for these instructions, because
// the linker may keep this copy for the whole module.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#include "make_table.h"

namespace ds_kernels {

constexpr KernelTable kAvx512Kernels = DS_KERNELS_TABLE("avx512");

}  // namespace ds_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
