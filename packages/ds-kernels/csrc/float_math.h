// Functions of one float32 number, from plain arithmetic and fused multiply-adds.
//
// Without branches, so that loops over them vectorize for every instruction set and all of them give the same bits.
// NaN goes through; infinities give the limits. Largest errors, found by comparing with float64 (tests/test_math.py):
// exp 1 unit in the last place, also where results are subnormal; sigmoid 3, and 0 below e^-88.7; the density of the
// normal distribution 4, its cdf 6, in both tails, down to where the density is no normal number.
//
// Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstdint>

#include "exp.h"
#include "float_format.h"

namespace {

// A choice between two numbers that are both there: GCC makes it a blend or a minimum, and NaN passes.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float at_least(float x, float limit) { return x < limit ? limit : x; }

// e^x = 2^n * e^r with |r| <= ln(2) / 2; a polynomial gives e^r (minimax, relative error 3e-9).
inline float exp(float x) {
    constexpr float kRound = 0x1.8p23f;  // added to a number, it leaves the nearest integer in the last bits
    const float inside = at_least(at_most(x, 89.0f), -104.0f);
    const float shifted = __builtin_fmaf(inside, 0x1.715476p+0f, kRound);
    const float n = shifted - kRound;
    float r = __builtin_fmaf(n, -0x1.62e4p-1f, inside);
    r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, r);
    float p = 0x1.6a2448p-10f;
    p = __builtin_fmaf(p, r, 0x1.1239d6p-7f);
    p = __builtin_fmaf(p, r, 0x1.5558f2p-5f);
    p = __builtin_fmaf(p, r, 0x1.555492p-3f);
    p = __builtin_fmaf(p, r, 0x1.fffffcp-2f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    // Two factors, because 2^n may be no normal number; only the second product rounds.
    const std::int32_t power = std::int32_t(as_bits(shifted)) - std::int32_t(0x4b400000);
    const std::int32_t half = power >> 1;
    const float low = as_float(std::uint32_t(half + 127) << 23);
    const float high = as_float(std::uint32_t(power - half + 127) << 23);
    return p * low * high;
}

// 1 / (1 + e^-x)
inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// The standard normal distribution at one point; its cdf is (1 + erf(x / sqrt(2))) / 2.
struct Normal {
    float cdf;
    float pdf;
};

// The tail beyond |x| is e^(-x^2 / 2) times a polynomial in 1 / (1 + c |x|) (minimax, relative error 3e-8), so that it
// keeps its relative accuracy where 1 + erf would cancel.
inline Normal normal(float x) {
    const float t = at_most(magnitude(x), 20.0f);
    const float square = t * t;
    const float rest = __builtin_fmaf(t, t, -square);
    const float bell = exp_of_nonpositive(-0.5f * square);
    const float e = __builtin_fmaf(bell, -0.5f * rest, bell);
    const float q = 1.0f / __builtin_fmaf(t, 0x1.2p-2f, 1.0f);
    float p = 0x1.0a6a8ap-6f;
    p = __builtin_fmaf(p, q, -0x1.8bdb9cp-5f);
    p = __builtin_fmaf(p, q, -0x1.17638cp-7f);
    p = __builtin_fmaf(p, q, 0x1.d840aap-4f);
    p = __builtin_fmaf(p, q, -0x1.3c6214p-6f);
    p = __builtin_fmaf(p, q, 0x1.062a88p-3f);
    p = __builtin_fmaf(p, q, 0x1.702f58p-4f);
    p = __builtin_fmaf(p, q, 0x1.d60b56p-4f);
    p = __builtin_fmaf(p, q, 0x1.ca7b26p-4f);
    p = __builtin_fmaf(p, q, 0x1.92fac6p-17f);
    const float tail = e * p;
    return {x < 0.0f ? tail : 1.0f - tail, e * 0x1.988454p-2f};
}

}  // namespace
