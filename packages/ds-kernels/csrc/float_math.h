// Functions of one float32 number, from plain arithmetic and fused multiply-adds.
//
// Without branches, so that loops over them vectorize for every instruction set and all of them give the same bits.
// NaN goes through; infinities give the limits. Largest errors, found by comparing with float64 (tests/test_math.py):
// exp 1 unit in the last place, sigmoid 3; the density of the normal distribution 3, its cdf 6, in both tails. Results
// that are no normal numbers may be 0; exp is infinite from 88.4 on.
//
// With `fine` false, a shorter computation: relative errors up to 2e-5, a twentieth of what rounding to float16 costs, for
// results that are stored as float16 or bfloat16.
//
// Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstdint>

#include "float_format.h"

namespace {

// A choice between two numbers that are both there: GCC makes it a blend or a minimum, and NaN passes.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float at_least(float x, float limit) { return x < limit ? limit : x; }

// e^(u x) = power * e^(u rest), where u is twice / 2: 1, -1 or -1/2.
struct Reduced {
    float rest;
    float power;  // 2^n
};

// For -88 <= u x <= 89. There, n is -127 ... 128, and 2^n is 0 for the least and infinity for the greatest.
template <int twice>
inline Reduced reduce(float x) {
    constexpr float kUnit = twice / 2.0f, kPerUnit = 2.0f / twice;  // factors that are powers of two change no rounding
    constexpr float kRound = 0x1.8p23f;  // added to a number, it leaves the nearest integer in the last bits
    const float shifted = __builtin_fmaf(x, kUnit * 0x1.715476p+0f, kRound);
    const float n = shifted - kRound;
    const float rest = __builtin_fmaf(n, kPerUnit * -0x1.62e4p-1f, x);  // exact
    return {__builtin_fmaf(n, kPerUnit * -0x1.7f7d1cp-20f, rest), as_float((as_bits(shifted) + 127u) << 23)};
}

// e^(u r) for |u r| <= ln(2) / 2 (minimax, relative error 3e-9, or 3e-6).
template <bool fine, int twice>
inline float exp_of_rest(float r) {
    constexpr float u = twice / 2.0f, u2 = u * u, u3 = u2 * u, u4 = u3 * u, u5 = u4 * u, u6 = u5 * u;
    if constexpr (fine) {
        float p = __builtin_fmaf(u6 * 0x1.6a2448p-10f, r, u5 * 0x1.1239d6p-7f);
        p = __builtin_fmaf(p, r, u4 * 0x1.5558f2p-5f);
        p = __builtin_fmaf(p, r, u3 * 0x1.555492p-3f);
        p = __builtin_fmaf(p, r, u2 * 0x1.fffffcp-2f);
        p = __builtin_fmaf(p, r, u);
        return __builtin_fmaf(p, r, 1.0f);
    } else {
        float p = __builtin_fmaf(u4 * 0x1.53a1p-5f, r, u3 * 0x1.57e0b6p-3f);
        p = __builtin_fmaf(p, r, u2 * 0x1.0005b6p-1f);
        p = __builtin_fmaf(p, r, u * 0x1.fffb34p-1f);
        return __builtin_fmaf(p, r, 0x1.ffffe8p-1f);
    }
}

// e^(u x) for -88 <= u x <= 89.
template <bool fine, int twice>
inline float exp_within(float x) {
    const Reduced at = reduce<twice>(x);
    return exp_of_rest<fine, twice>(at.rest) * at.power;
}

template <bool fine>
inline float exp(float x) {
    return exp_within<fine, 2>(at_least(at_most(x, 89.0f), -88.0f));
}

// 1 + e^-x, by which sigmoid divides 1
template <bool fine>
inline float one_plus_exp_minus(float x) {
    return 1.0f + exp_within<fine, -2>(at_least(at_most(x, 88.0f), -89.0f));
}

template <bool fine>
inline float sigmoid(float x) {
    return 1.0f / one_plus_exp_minus<fine>(x);
}

// The standard normal distribution at some x; its cdf is (1 + erf(x / sqrt(2))) / 2.
struct Normal {
    float away;  // |x|, at most 13.25: from 13.24 on, tail and bell are 0
    float tail;  // cdf(-|x|)
    float bell;  // e^(-x^2 / 2)

    static constexpr float kDensity = 0x1.988454p-2f;  // times the bell: the density
};

// The tail is the bell times a polynomial in 1 / (1 + c |x|) (minimax, relative error 3e-8, or 1.2e-5), so that it keeps
// its relative accuracy where 1 + erf would cancel.
template <bool fine>
inline Normal normal(float x) {
    const float t = at_most(magnitude(x), 13.25f);
    const float square = t * t;
    Reduced at = reduce<-1>(square);
    if constexpr (fine) at.rest += __builtin_fmaf(t, t, -square);
    const float bell = exp_of_rest<fine, -1>(at.rest) * at.power;
    const float q = 1.0f / __builtin_fmaf(t, fine ? 0x1.2p-2f : 0x1.7p-2f, 1.0f);
    if constexpr (fine) {
        float p = __builtin_fmaf(0x1.0a6a8ap-6f, q, -0x1.8bdb9cp-5f);
        p = __builtin_fmaf(p, q, -0x1.17638cp-7f);
        p = __builtin_fmaf(p, q, 0x1.d840aap-4f);
        p = __builtin_fmaf(p, q, -0x1.3c6214p-6f);
        p = __builtin_fmaf(p, q, 0x1.062a88p-3f);
        p = __builtin_fmaf(p, q, 0x1.702f58p-4f);
        p = __builtin_fmaf(p, q, 0x1.d60b56p-4f);
        p = __builtin_fmaf(p, q, 0x1.ca7b26p-4f);
        p = __builtin_fmaf(p, q, 0x1.92fac6p-17f);
        return {t, bell * p, bell};
    } else {
        float p = __builtin_fmaf(-0x1.962p-4f, q, 0x1.07d65p-2f);
        p = __builtin_fmaf(p, q, 0x1.05922ap-5f);
        p = __builtin_fmaf(p, q, 0x1.5b9efp-3f);
        p = __builtin_fmaf(p, q, 0x1.1df062p-3f);
        p = __builtin_fmaf(p, q, 0x1.b916e2p-13f);
        return {t, bell * p, bell};
    }
}

template <bool fine>
inline float normal_cdf(float x) {
    const float tail = normal<fine>(x).tail;
    return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace
