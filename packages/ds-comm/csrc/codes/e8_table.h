// What each instruction set provides for the E8 code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds_comm {

struct E8Layout {
    std::size_t numel;
    std::size_t block;     // elements that share a scale: a multiple of 64, at most 1024
    const float* vectors;  // [8, 256]: for each byte its vector
};

struct E8Table {
    void (*encode)(const float* x, float* error, std::uint8_t* payload, const E8Layout& layout);
    void (*decode)(float* out, const std::uint8_t* payload, const E8Layout& layout, float factor);
    void (*accumulate)(float* out, const std::uint8_t* payload, const E8Layout& layout, float factor);
};

extern const E8Table kBaseE8;
#if defined(__x86_64__) && defined(__GNUC__)
#define DS_COMM_X86 1
extern const E8Table kAvx2E8;
#endif

inline const E8Table& best_e8() {
#if defined(DS_COMM_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        return kAvx2E8;
    }
#endif
    return kBaseE8;
}

}  // namespace ds_comm
