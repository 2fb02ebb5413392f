// Stochastic rounding to bfloat16: up or down, with the odds that leave the expectation as it is.
//
// The random bits are a hash of a key and of the element's index in the whole array, so that they do not depend on
// threads, on where an array is cut, or on the instruction set; see [Note: Keyed bits] in
// backends/plain/stochastic.py, which has the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_format.h"

namespace {

// Of 2^32 elements.
struct HashKey {
    std::uint32_t before;
    std::uint32_t between;
};

inline HashKey hash_key(std::uint64_t key, std::uint64_t segment) {
    std::uint64_t x = (key ^ segment) + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return {std::uint32_t(x), std::uint32_t(x >> 32)};
}

inline std::uint32_t random_bits(std::uint32_t index, HashKey key) {
    std::uint32_t x = index ^ key.before;
    x = (x ^ (x >> 17)) * 0xed5ad4bbu;
    x = (x ^ (x >> 11)) + key.between;
    x *= 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    return x ^ (x >> 14);
}

inline void round_segment(const float* in, std::uint16_t* out, std::uint32_t first, HashKey key, std::size_t n) {
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t bits = as_bits(in[i]);
        const std::uint32_t rounded = (bits + (random_bits(first + std::uint32_t(i), key) >> 16)) >> 16;
        out[i] = std::uint16_t((bits & kMagnitude) > kInfinity ? 0x7fc0u : rounded);
    }
}

// `extra` holds two numbers of 64 bits: the key, and the index of the array's first element in the whole.
inline void encode_stochastic(const float* in, void* data, void* extra, std::size_t begin, std::size_t n) {
    constexpr std::uint64_t kSegment = std::uint64_t(1) << 32;
    auto* const stored = static_cast<std::uint16_t*>(data) + begin;
    const auto* const words = static_cast<const std::uint64_t*>(extra);
    const std::uint64_t first = words[1] + begin;
    const std::uint64_t left = kSegment - first % kSegment;
    const std::size_t here = left < n ? std::size_t(left) : n;
    round_segment(in, stored, std::uint32_t(first), hash_key(words[0], first / kSegment), here);
    round_segment(in + here, stored + here, 0, hash_key(words[0], first / kSegment + 1), n - here);
}

}  // namespace
