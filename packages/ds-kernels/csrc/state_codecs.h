// How arrays of float32 values lie in memory: one block of them becomes floats, and back.
//
// A codec is named by the data type it stores; the numbers are those of CODECS in backends/native/optimizers.py.
// Only operations that are correctly rounded, and no sums: all instruction sets, and plain torch, give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_format.h"

namespace {

// Formats of one array; `extra` is not used.
template <class Format>
void decode_format(const void* data, const void*, float* out, std::size_t begin, std::size_t n) {
    const auto* const stored = static_cast<const typename Format::Storage*>(data) + begin;
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = Format::widen(stored[i]);
    }
}

template <class Format>
void encode_format(const float* in, void* data, void*, std::size_t begin, std::size_t n) {
    auto* const stored = static_cast<typename Format::Storage*>(data) + begin;
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        stored[i] = Format::narrow(in[i]);
    }
}

// Split: the nearest bfloat16 (halfway cases away from zero) and, in `extra`, the 16 bits that complete it to the
// float32. Exact, but for NaN, which becomes the canonical one, so that a NaN is one in bfloat16, too.
//
// Bits below a zero and above an infinity are never encoded: somebody else wrote the upper half. They do not count, or
// the sum would be NaN.
inline std::uint32_t joined(std::uint16_t high, std::int16_t low) {
    const std::uint32_t size = high & 0x7fffu;
    const std::int32_t least = size == 0 ? 0 : -0x8000;
    const std::int32_t most = size == 0x7f80u ? 0 : 0x7fff;
    const std::int32_t given = low;
    const std::int32_t raised = given < least ? least : given;
    return (std::uint32_t(high) << 16) + std::uint32_t(raised > most ? most : raised);
}

inline void decode_split(const void* data, const void* extra, float* out, std::size_t begin, std::size_t n) {
    const auto* const high = static_cast<const std::uint16_t*>(data) + begin;
    const auto* const low = static_cast<const std::int16_t*>(extra) + begin;
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = as_float(joined(high[i], low[i]));
    }
}

inline void encode_split(const float* in, void* data, void* extra, std::size_t begin, std::size_t n) {
    auto* const high = static_cast<std::uint16_t*>(data) + begin;
    auto* const low = static_cast<std::int16_t*>(extra) + begin;
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t given = as_bits(in[i]);
        const std::uint32_t bits = (given & kMagnitude) > kInfinity ? 0x7fc00000u : given;
        high[i] = std::uint16_t((bits + 0x8000u) >> 16);
        low[i] = std::int16_t(std::uint16_t(bits));
    }
}

// [Note: Codes of 8 bits]
// Groups of 32 values share a scale, the largest magnitude as bfloat16. A signed moment m is stored as
// q = round(254 m / (s + |m|)), which is 127 times the compander 2x / (1 + |x|) of x = m / s; a second moment v as
// q = round(255 sqrt(v) / s) with s of the roots, and at least 1 where v > 0: a moment that came back as 0 would divide
// the first one by eps alone. A group that holds a NaN or an infinity comes back as NaN.
constexpr std::size_t kGroupSize = 32;
constexpr float kRounder = 0x1.8p23f;  // adding it leaves the nearest integer, ties to even, in the low bits

struct GroupScale {
    float value;         // 1 instead of 0, so that one can divide by it
    std::uint32_t mask;  // 0 where all codes of the group are 0
};

inline GroupScale store_scale(std::uint32_t largest_bits, bool root, std::uint16_t* scale) {
    const float largest = as_float(largest_bits);
    const std::uint16_t stored = BFloat16::narrow(root ? __builtin_sqrtf(largest) : largest);
    const bool infinite = (stored & 0x7f80u) == 0x7f80u;
    const bool zero = (stored & 0x7f80u) == 0;  // below the normal numbers
    *scale = infinite ? 0x7fc0u : zero ? 0u : stored;
    return infinite || zero ? GroupScale{1.0f, 0u} : GroupScale{BFloat16::widen(stored), ~0u};
}

inline std::uint32_t largest_bits(const float* in, std::size_t n) {
    std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t size = as_bits(in[i]) & kMagnitude;
        largest = size > largest ? size : largest;
    }
    return largest;
}

inline void encode_signed_group(const float* in, std::int8_t* codes, std::uint16_t* scale, std::size_t n) {
    const GroupScale s = store_scale(largest_bits(in, n), false, scale);
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        const float code = 254.0f * (in[i] / (s.value + as_float(as_bits(in[i]) & kMagnitude)));
        codes[i] = std::int8_t(std::uint8_t(as_bits(code + kRounder) & s.mask));
    }
}

inline void encode_root_group(const float* in, std::uint8_t* codes, std::uint16_t* scale, std::size_t n) {
    const GroupScale s = store_scale(largest_bits(in, n), true, scale);
    const float factor = 255.0f / s.value;
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        const float code = __builtin_sqrtf(in[i]) * factor;
        const float below = code < 255.0f ? code : 255.0f;
        const std::uint32_t nearest = as_bits(below + kRounder) & 0xffu;
        const std::uint32_t positive = in[i] > 0.0f ? 1u : 0u;
        codes[i] = std::uint8_t((nearest > positive ? nearest : positive) & s.mask);
    }
}

inline void decode_signed_group(const std::int8_t* codes, const std::uint16_t* scale, float* out, std::size_t n) {
    const float s = BFloat16::widen(*scale);
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        const float q = float(std::int32_t(codes[i]));
        out[i] = s * (q / (254.0f - as_float(as_bits(q) & kMagnitude)));
    }
}

inline void decode_root_group(const std::uint8_t* codes, const std::uint16_t* scale, float* out, std::size_t n) {
    const float unit = BFloat16::widen(*scale) / 255.0f;
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        const float root = unit * float(std::int32_t(codes[i]));
        out[i] = root * root;
    }
}

// Calls group(first, scale's place, elements) for each group; all but the last one with a constant, which the compiler
// unrolls.
template <class Group>
inline void for_groups(std::size_t begin, std::size_t n, const Group& group) {
    const std::size_t whole = n / kGroupSize * kGroupSize;
    for (std::size_t first = 0; first < whole; first += kGroupSize) {
        group(first, (begin + first) / kGroupSize, kGroupSize);
    }
    if (whole < n) {
        group(whole, (begin + whole) / kGroupSize, n - whole);
    }
}

inline void decode_signed(const void* data, const void* extra, float* out, std::size_t begin, std::size_t n) {
    const auto* const codes = static_cast<const std::int8_t*>(data) + begin;
    const auto* const scales = static_cast<const std::uint16_t*>(extra);
    for_groups(begin, n, [&](std::size_t first, std::size_t group, std::size_t count) {
        decode_signed_group(codes + first, scales + group, out + first, count);
    });
}

inline void encode_signed(const float* in, void* data, void* extra, std::size_t begin, std::size_t n) {
    auto* const codes = static_cast<std::int8_t*>(data) + begin;
    auto* const scales = static_cast<std::uint16_t*>(extra);
    for_groups(begin, n, [&](std::size_t first, std::size_t group, std::size_t count) {
        encode_signed_group(in + first, codes + first, scales + group, count);
    });
}

inline void decode_root(const void* data, const void* extra, float* out, std::size_t begin, std::size_t n) {
    const auto* const codes = static_cast<const std::uint8_t*>(data) + begin;
    const auto* const scales = static_cast<const std::uint16_t*>(extra);
    for_groups(begin, n, [&](std::size_t first, std::size_t group, std::size_t count) {
        decode_root_group(codes + first, scales + group, out + first, count);
    });
}

inline void encode_root(const float* in, void* data, void* extra, std::size_t begin, std::size_t n) {
    auto* const codes = static_cast<std::uint8_t*>(data) + begin;
    auto* const scales = static_cast<std::uint16_t*>(extra);
    for_groups(begin, n, [&](std::size_t first, std::size_t group, std::size_t count) {
        encode_root_group(in + first, codes + first, scales + group, count);
    });
}

}  // namespace
