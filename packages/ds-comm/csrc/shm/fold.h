// Reductions of several arrays into one, element by element and always in the order of the arrays.
//
// 16-bit floats are added as float32 and rounded once, at the end. One block of partial results stays in the first-level
// cache. Include only from fold_*.cpp, behind the target pragma: internal linkage keeps each instruction set's copy apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fold_table.h"

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

template <class T>
struct Plain {
    using Storage = T;
    using Value = T;
    static T widen(T stored) { return stored; }
    static T narrow(T value) { return value; }
};

// Stored as 0 and 1: a sum is true if any is, a product if all are.
struct Bool {
    using Storage = std::uint8_t;
    using Value = std::uint32_t;
    static std::uint32_t widen(std::uint8_t stored) { return stored != 0; }
    static std::uint8_t narrow(std::uint32_t value) { return value != 0; }
};

// Narrowing rounds to nearest, ties to even; every NaN becomes the one canonical quiet NaN.
struct BFloat16 {
    using Storage = std::uint16_t;
    using Value = float;
    static float widen(std::uint16_t stored) { return as_float(std::uint32_t(stored) << 16); }
    static std::uint16_t narrow(float value) {
        const std::uint32_t bits = as_bits(value);
        const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return std::uint16_t((bits & kMagnitude) > kInfinity ? 0x7fc0u : rounded);
    }
};

struct Float16 {
    using Storage = std::uint16_t;
    using Value = float;
    static float widen(std::uint16_t stored) {
        const std::uint32_t sign = std::uint32_t(stored & 0x8000u) << 16;
        const std::uint32_t rest = std::uint32_t(stored & 0x7fffu) << 13;
        // Multiplying by 2^(127-15) rebiases the exponent, and normalizes subnormals exactly.
        const std::uint32_t finite = as_bits(as_float(rest) * 0x1p112f);
        return as_float((rest < 0x0f800000u ? finite : rest | kInfinity) | sign);
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

// Signed overflow wraps around, as in torch; in C++ only unsigned numbers do.
template <class T, bool = std::is_integral<T>::value>
struct Wrapping {
    using type = T;
};
template <class T>
struct Wrapping<T, true> {
    // products of 16 bits would be promoted to int, which overflows
    using type = typename std::conditional<sizeof(T) < 4, unsigned, typename std::make_unsigned<T>::type>::type;
};

struct Sum {
    template <class T>
    static T apply(T a, T b) {
        using W = typename Wrapping<T>::type;
        return T(W(a) + W(b));
    }
};
struct Product {
    template <class T>
    static T apply(T a, T b) {
        using W = typename Wrapping<T>::type;
        return T(W(a) * W(b));
    }
};
// NaN wins, as in torch.minimum.
struct Min {
    template <class T>
    static T apply(T a, T b) {
        return a < b || a != a ? a : b;
    }
};
struct Max {
    template <class T>
    static T apply(T a, T b) {
        return a > b || a != a ? a : b;
    }
};
struct And {
    template <class T>
    static T apply(T a, T b) {
        return T(a & b);
    }
};
struct Or {
    template <class T>
    static T apply(T a, T b) {
        return T(a | b);
    }
};
struct Xor {
    template <class T>
    static T apply(T a, T b) {
        return T(a ^ b);
    }
};

template <class Format, class Op, bool mean>
void fold(void* out, const void* const* arrays, std::size_t num_arrays, std::size_t numel) {
    using Storage = typename Format::Storage;
    using Value = typename Format::Value;
    constexpr std::size_t kBlock = 1024;
    Value part[kBlock];
    const auto at = [&](std::size_t array, std::size_t begin) {
        return static_cast<const Storage*>(arrays[array]) + begin;
    };
    for (std::size_t begin = 0; begin < numel; begin += kBlock) {
        const std::size_t n = numel - begin < kBlock ? numel - begin : kBlock;
        const Storage* const first = at(0, begin);
        for (std::size_t i = 0; i < n; ++i) {
            part[i] = Format::widen(first[i]);
        }
        for (std::size_t array = 1; array < num_arrays; ++array) {
            const Storage* const next = at(array, begin);
            for (std::size_t i = 0; i < n; ++i) {
                part[i] = Op::template apply<Value>(part[i], Format::widen(next[i]));
            }
        }
        Storage* const to = static_cast<Storage*>(out) + begin;
        for (std::size_t i = 0; i < n; ++i) {
            to[i] = Format::narrow(mean ? Value(part[i] / Value(num_arrays)) : part[i]);
        }
    }
}

// Rows in the order of Reduction; what is not defined for the format stays null.
template <class Format, bool floating>
constexpr ds_comm::FoldRow row() {
    using ds_comm::FoldRow;
    if constexpr (floating) {
        return FoldRow{{&fold<Format, Sum, false>, &fold<Format, Sum, true>, &fold<Format, Product, false>,
                        &fold<Format, Min, false>, &fold<Format, Max, false>, nullptr, nullptr, nullptr}};
    } else {
        return FoldRow{{&fold<Format, Sum, false>, nullptr, &fold<Format, Product, false>, &fold<Format, Min, false>,
                        &fold<Format, Max, false>, &fold<Format, And, false>, &fold<Format, Or, false>,
                        &fold<Format, Xor, false>}};
    }
}

// In the order of Format in fold_table.h.
constexpr ds_comm::FoldTable table() {
    return {{row<Plain<float>, true>(), row<Plain<double>, true>(), row<BFloat16, true>(), row<Float16, true>(),
             row<Plain<std::int8_t>, false>(), row<Plain<std::uint8_t>, false>(), row<Plain<std::int16_t>, false>(),
             row<Plain<std::int32_t>, false>(), row<Plain<std::int64_t>, false>(), row<Bool, false>()}};
}

}  // namespace
