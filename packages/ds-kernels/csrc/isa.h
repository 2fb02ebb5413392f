// Which instruction sets this processor can run.
#pragma once

#include <vector>

#include "kernel_table.h"

namespace ds_kernels {

// Fastest first; never empty.
inline std::vector<const KernelTable*> supported_kernels() {
    std::vector<const KernelTable*> tables;
#if defined(DS_KERNELS_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) {
        tables.push_back(&kAvx512Kernels);
    }
    if (avx2) {
        tables.push_back(&kAvx2Kernels);
    }
#endif
    tables.push_back(&kScalarKernels);
    return tables;
}

}  // namespace ds_kernels
