// Storage formats of floating-point arrays: how one element becomes a float and back.
//
// Plain integer and float32 arithmetic without branches, so that the compiler vectorizes it for every instruction
// set and all of them give the same bits. (The avx512_bf16 instructions would not: they flush subnormals.)
// Narrowing rounds to nearest, ties to even; every NaN becomes the one canonical quiet NaN.
//
// Include only from isa_*.cpp, behind the target pragma: internal linkage keeps each instruction set's copy apart.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr std::uint32_t kMagnitude = 0x7fffffffu;
constexpr std::uint32_t kInfinity = 0x7f800000u;

inline float magnitude(float x) { return as_float(as_bits(x) & kMagnitude); }

// `kFine`: whether an error of 2e-5 of a number shows beside the rounding to the format.

struct Float32 {
    using Storage = float;
    static constexpr bool kFine = true;

    static float widen(float stored) { return stored; }
    static float narrow(float value) { return value; }
};

struct BFloat16 {
    using Storage = std::uint16_t;
    static constexpr bool kFine = false;

    static float widen(std::uint16_t stored) { return as_float(std::uint32_t(stored) << 16); }

    static std::uint16_t narrow(float value) {
        const std::uint32_t bits = as_bits(value);
        const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return std::uint16_t((bits & kMagnitude) > kInfinity ? 0x7fc0u : rounded);
    }
};

struct Float16 {
    using Storage = std::uint16_t;
    static constexpr bool kFine = false;

    static float widen(std::uint16_t stored) {
        const std::uint32_t sign = std::uint32_t(stored & 0x8000u) << 16;
        const std::uint32_t rest = std::uint32_t(stored & 0x7fffu) << 13;
        // Multiplying by 2^(127-15) rebiases the exponent, and normalizes subnormals exactly.
        const std::uint32_t finite = as_bits(as_float(rest) * 0x1p112f);
        const std::uint32_t special = rest | kInfinity;
        return as_float((rest < 0x0f800000u ? finite : special) | sign);
    }

    static std::uint16_t narrow(float value) {
        const std::uint32_t bits = as_bits(value);
        const std::uint32_t sign = (bits >> 16) & 0x8000u;
        const std::uint32_t size = bits & kMagnitude;
        // Rebias the exponent by -112 and round; a carry out of the mantissa correctly raises the exponent.
        const std::uint32_t normal = (size - (112u << 23) + 0x0fffu + ((size >> 13) & 1u)) >> 13;
        // The last place of 0.5f is 2^-24, the unit of half subnormals: the addition itself rounds to it.
        const std::uint32_t subnormal = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
        std::uint32_t half = size < 0x38800000u ? subnormal : normal;
        half = size < 0x47800000u ? half : 0x7c00u;
        return std::uint16_t(size > kInfinity ? 0x7e00u : half | sign);
    }
};

}  // namespace
