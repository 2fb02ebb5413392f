// float16 as stored in payloads, converted by hand: one for each block, and the same on every processor.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace {

// To nearest, ties to even; what is finite stays finite.
inline std::uint16_t to_half(float x) {
    const std::uint32_t bits = as_bits(x);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t size = bits & 0x7fffffffu;
    if (size >= 0x7f800000u) return static_cast<std::uint16_t>(sign | (size > 0x7f800000u ? 0x7e00u : 0x7c00u));
    if (size >= 0x477fe000u) return static_cast<std::uint16_t>(sign | 0x7bffu);  // 65504 and above
    if (size < 0x38800000u) {  // less than 2^-14: its multiple of 2^-24, which is what adding 0.5 leaves below
        return static_cast<std::uint16_t>(sign | (as_bits(as_float(size) + 0.5f) - 0x3f000000u));
    }
    const std::uint32_t odd = size >> 13 & 1u;
    return static_cast<std::uint16_t>(sign | ((size - 0x38000000u + 0xfffu + odd) >> 13));
}

inline float from_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t size = half & 0x7fffu;
    if (size >= 0x7c00u) return as_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    if (size < 0x400u) return as_float(sign | as_bits(static_cast<float>(size) * 0x1p-24f));
    return as_float(sign | (size + 0x1c000u) << 13);
}

}  // namespace
