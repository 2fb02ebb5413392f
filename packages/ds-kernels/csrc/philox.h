// Random numbers as a function of a seed and an element's place: Philox4x32 with 10 rounds.
//
// See [Note: Element numbers] in backends/plain/philox.py. A multiplication of 32 bits that gives 64 is one instruction
// for as many counters as a vector has 64-bit lanes, but no loop that compilers see as one: hence the vectors by name.
// Their upper halves hold garbage in between; only products look at halves, and only at the lower ones.
//
// Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dropout_table.h"

namespace {

#if defined(__AVX512F__)
using Wide = std::uint64_t __attribute__((vector_size(64)));
constexpr std::size_t kChains = 4;  // independent vectors, to hide the latency of multiplications
inline Wide product(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
using Wide = std::uint64_t __attribute__((vector_size(32)));
constexpr std::size_t kChains = 2;
inline Wide product(Wide a, Wide b) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
using Wide = std::uint64_t __attribute__((vector_size(16)));
constexpr std::size_t kChains = 2;
inline Wide product(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif

constexpr std::size_t kWide = sizeof(Wide) / sizeof(std::uint64_t);
constexpr std::size_t kCounterNumbers = 8;  // 16-bit numbers of one counter
constexpr std::size_t kNumbers = 512;       // of a batch

// The 8 * kWide numbers of consecutive counters, from the state after the last round.
inline void write_numbers(Wide c0, Wide c1, Wide c2, Wide c3, std::uint16_t* out) {
    const Wide low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
    std::uint64_t pairs[2 * kWide];
#pragma omp simd
    for (std::size_t i = 0; i < kWide; ++i) {
        pairs[2 * i] = low[i];
        pairs[2 * i + 1] = high[i];
    }
    std::memcpy(out, pairs, sizeof pairs);
}

// Fills `out` with the numbers of `count` counters from `first`, and of those that fill up the last vectors.
inline void philox(std::uint64_t seed, std::uint64_t first, std::size_t count, std::uint16_t* out) {
    static_assert(kNumbers % (kCounterNumbers * kWide * kChains) == 0, "a batch must hold whole vectors");
    const Wide m0 = Wide{} + 0xD2511F53u, m1 = Wide{} + 0xCD9E8D57u;
    Wide lanes{};
    for (std::size_t i = 0; i < kWide; ++i) lanes[i] = i;
    for (std::size_t at = 0; at < count; at += kChains * kWide) {
        Wide c0[kChains], c1[kChains], c2[kChains] = {}, c3[kChains] = {};
        for (std::size_t v = 0; v < kChains; ++v) {
            c0[v] = lanes + (first + at + v * kWide);
            c1[v] = c0[v] >> 32;
        }
        std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
            for (std::size_t v = 0; v < kChains; ++v) {
                const Wide p0 = product(c0[v], m0), p1 = product(c2[v], m1);
                c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
                c1[v] = p1;
                c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
                c3[v] = p0;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (std::size_t v = 0; v < kChains; ++v) {
            write_numbers(c0[v], c1[v], c2[v], c3[v], out + kCounterNumbers * (at + v * kWide));
        }
    }
}

// Calls body(at, n, numbers) on batches of the elements begin ... end. Where nothing is dropped all numbers are 0.
template <class Body>
inline void for_numbers(const ds_kernels::DropoutKey& key, std::size_t begin, std::size_t end, const Body& body) {
    alignas(64) std::uint16_t numbers[kNumbers] = {};
    while (begin < end) {
        const std::size_t skipped = begin % kCounterNumbers;
        const std::size_t n = end - begin < kNumbers - skipped ? end - begin : kNumbers - skipped;
        if (key.threshold > 0) {
            philox(key.seed, begin / kCounterNumbers, (skipped + n + kCounterNumbers - 1) / kCounterNumbers, numbers);
        }
        body(begin, n, static_cast<const std::uint16_t*>(numbers + skipped));
        begin += n;
    }
}

}  // namespace
