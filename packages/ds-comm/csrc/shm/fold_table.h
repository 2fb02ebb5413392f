// Which reductions there are; numbers as in calls.py.
#pragma once

#include <cstddef>

namespace ds_comm {

using Fold = void (*)(void* out, const void* const* arrays, std::size_t num_arrays, std::size_t numel);

// sum, mean, product, min, max, and, or, xor
constexpr std::size_t kNumReductions = 8;
// float32, float64, bfloat16, float16, int8, uint8, int16, int32, int64, bool
constexpr std::size_t kNumFormats = 10;

struct FoldRow {
    Fold by_reduction[kNumReductions];
};

struct FoldTable {
    FoldRow by_format[kNumFormats];
};

extern const FoldTable kBaseFolds;
#if defined(__x86_64__) && defined(__GNUC__)
#define DS_COMM_X86 1
extern const FoldTable kAvx2Folds;
#endif

inline const FoldTable& best_folds() {
#if defined(DS_COMM_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        return kAvx2Folds;
    }
#endif
    return kBaseFolds;
}

}  // namespace ds_comm
