// What the codes share: bits of floats, and sums in the one order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr std::size_t kMaxBlock = 1024;
constexpr std::size_t kLanes = 64;

inline std::uint32_t as_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float magnitude(float x) { return as_float(as_bits(x) & 0x7fffffffu); }

// Sum of m terms in lanes, which then meet 32, 16, ..., 1 apart.
inline float lane_sum(const float* terms, std::size_t m) {
    float lanes[kLanes] = {};
    std::size_t first = 0;
    for (; first + kLanes <= m; first += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += terms[first + lane];
    }
    for (std::size_t lane = 0; first + lane < m; ++lane) lanes[lane] += terms[first + lane];
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

// Element i of a block plus what is owed of it.
inline void read_block(const float* x, const float* error, std::size_t numel, float* block) {
    if (error == nullptr) {
        std::memcpy(block, x, numel * sizeof(float));
    } else {
        for (std::size_t i = 0; i < numel; ++i) block[i] = x[i] + error[i];
    }
}

}  // namespace
