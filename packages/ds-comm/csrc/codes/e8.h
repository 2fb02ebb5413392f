// The code of [Note: E8 payload] in codecs/e8.py, to the bit: included once for each instruction set.
//
// All loops run over the bytes of a block: an element of every group at a time, consecutive in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "table.h"

namespace {

constexpr std::size_t kMaxBytes = kMaxBlock / 8;
constexpr std::uint32_t kPlace = 7;  // bits of a magnitude that hold its place
constexpr std::uint32_t kNothing = 127;
constexpr std::uint32_t kPairs = 128;
constexpr std::uint32_t kSingles = 240;

inline std::uint32_t smaller(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }
inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a < b ? b : a; }

// What is known of every group of a block.
struct Groups {
    alignas(64) std::uint32_t largest[kMaxBytes];  // magnitude and place
    alignas(64) std::uint32_t second[kMaxBytes];
    alignas(64) std::uint32_t smallest[kMaxBytes];
    alignas(64) std::uint32_t negative[kMaxBytes];
    alignas(64) std::uint32_t codes[kMaxBytes];  // of the better vector
    alignas(64) float product[kMaxBytes];        // its inner product with the group
    alignas(64) float single[kMaxBytes];         // that of the single
    alignas(64) float terms[kMaxBytes];          // of a sum
};

inline void rank(const float* x, std::size_t m, Groups& g) {
    for (std::size_t j = 0; j < m; ++j) {
        g.largest[j] = 0;
        g.second[j] = 0;
        g.smallest[j] = 0x7fffffffu;
        g.negative[j] = 0;
    }
    for (std::uint32_t i = 0; i < 8; ++i) {
        const float* const row = x + i * m;
        for (std::size_t j = 0; j < m; ++j) {
            const std::uint32_t key = (as_bits(row[j]) & 0x7ffffff8u) | i;
            g.second[j] = larger(g.second[j], smaller(g.largest[j], key));
            g.largest[j] = larger(g.largest[j], key);
            g.smallest[j] = smaller(g.smallest[j], key);
            g.negative[j] |= (row[j] < 0.0f ? 1u : 0u) << i;
        }
    }
}

inline void find_better(const float* x, std::size_t m, Groups& g) {
    for (std::size_t j = 0; j < m; ++j) {
        const auto size = [&](std::size_t i) { return magnitude(x[i * m + j]); };
        const float sum = ((size(0) + size(4)) + (size(2) + size(6))) + ((size(1) + size(5)) + (size(3) + size(7)));
        const std::uint32_t negative = g.negative[j];
        std::uint32_t odd = negative ^ (negative >> 4);
        odd ^= odd >> 2;
        odd = (odd ^ (odd >> 1)) & 1u;
        const std::uint32_t signs = negative ^ (odd << (g.smallest[j] & kPlace));
        const float smallest = as_float(g.smallest[j] & ~kPlace), largest = as_float(g.largest[j] & ~kPlace);
        const float halves = sum * 0.5f - smallest * static_cast<float>(static_cast<std::int32_t>(odd));
        const float pair = largest + as_float(g.second[j] & ~kPlace);
        const std::uint32_t p = smaller(g.largest[j] & kPlace, g.second[j] & kPlace);
        const std::uint32_t q = larger(g.largest[j] & kPlace, g.second[j] & kPlace);
        const std::uint32_t pairs =
            kPairs + 4u * ((q * (q - 1u) >> 1) + p) + 2u * ((negative >> q) & 1u) + ((negative >> p) & 1u);
        const bool is_halves = (halves > pair) & (smallest > 0.0f) & (signs != 255u);
        g.product[j] = is_halves ? halves : pair;
        g.codes[j] = is_halves ? signs & kNothing : pairs;
        g.single[j] = largest;
    }
}

// 2: the better vector is nearest, 1: the single, 0: nothing.
inline std::uint32_t nearest(float product, float single, float scale) {
    const float half = scale * 0.5f;
    const bool is_better = (product - single > half) & (product > scale);
    return is_better ? 2u : single > half ? 1u : 0u;
}

// Codes a block of 8 m elements into m bytes, and returns the scale.
inline float code_block(const float* x, std::size_t m, std::uint8_t* codes, Groups& g) {
    rank(x, m, g);
    find_better(x, m, g);
    const float total = lane_sum(g.product, m);
    for (std::size_t j = 0; j < m; ++j) g.terms[j] = g.product[j] > 0.0f ? 1.0f : 0.0f;
    const float twice = 2.0f * lane_sum(g.terms, m);
    float scale = total / (twice < 1.0f ? 1.0f : twice);
    for (int turn = 0; turn < 2; ++turn) {
        for (std::size_t j = 0; j < m; ++j) {
            g.terms[j] = static_cast<float>(static_cast<std::int32_t>(nearest(g.product[j], g.single[j], scale)));
        }
        const float lengths = lane_sum(g.terms, m);
        for (std::size_t j = 0; j < m; ++j) {
            g.terms[j] = g.terms[j] == 2.0f ? g.product[j] : g.terms[j] == 1.0f ? g.single[j] : 0.0f;
        }
        if (lengths > 0.0f) scale = lane_sum(g.terms, m) / lengths;
    }
    for (std::size_t j = 0; j < m; ++j) {
        const std::uint32_t p = g.largest[j] & kPlace;
        const std::uint32_t single = kSingles + 2u * p + ((g.negative[j] >> p) & 1u);
        const std::uint32_t kind = nearest(g.product[j], g.single[j], scale);
        codes[j] = static_cast<std::uint8_t>(kind == 2u ? g.codes[j] : kind == 1u ? single : kNothing);
    }
    const bool finite = total - total == 0.0f;
    return finite ? scale : total;  // what is not finite shows in the scale
}

struct E8Place {
    std::size_t first;  // element
    std::size_t numel;
    std::size_t codes;  // byte in the payload
    std::size_t bytes;  // of codes

    E8Place(const ds_comm::E8Layout& layout, std::size_t index) {
        const std::size_t num_blocks = (layout.numel + layout.block - 1) / layout.block;
        first = index * layout.block;
        numel = layout.numel - first < layout.block ? layout.numel - first : layout.block;
        codes = 4 * num_blocks + index * (layout.block / 8);
        bytes = (numel + 7) / 8;
    }
};

// What each byte stands for: of its eight values twice each plus 2, four bits. Words are looked up once for a byte, where
// values would be for an element.
struct Words {
    std::uint32_t of[256];

    explicit Words(const float* vectors) {
        for (std::size_t code = 0; code < 256; ++code) {
            of[code] = 0;
            for (std::size_t k = 0; k < 8; ++k) {
                of[code] |= static_cast<std::uint32_t>(2.0f * vectors[256 * k + code] + 2.0f) << 4 * k;
            }
        }
    }

    void read(const std::uint8_t* codes, std::size_t m, std::uint32_t* words) const {
        for (std::size_t j = 0; j < m; ++j) words[j] = of[codes[j]];
    }
};

inline float value_of(std::uint32_t word, std::uint32_t k) {
    return static_cast<float>(static_cast<std::int32_t>(word >> 4 * k & 15u) - 2) * 0.5f;
}

void encode_e8(const float* x, float* error, std::uint8_t* payload, const ds_comm::E8Layout& layout) {
    const Words words(layout.vectors);
    alignas(64) float block[kMaxBlock];
    Groups groups;
    for (std::size_t i = 0; i * layout.block < layout.numel; ++i) {
        const E8Place place(layout, i);
        read_block(x + place.first, error == nullptr ? nullptr : error + place.first, place.numel, block);
        for (std::size_t j = place.numel; j < 8 * place.bytes; ++j) block[j] = 0.0f;
        std::uint8_t* const codes = payload + place.codes;
        const float scale = code_block(block, place.bytes, codes, groups);
        std::memcpy(payload + 4 * i, &scale, 4);
        if (error == nullptr) continue;
        words.read(codes, place.bytes, groups.codes);
        for (std::uint32_t k = 0; k < 8; ++k) {
            float* const row = block + k * place.bytes;
            for (std::size_t j = 0; j < place.bytes; ++j) row[j] -= value_of(groups.codes[j], k) * scale;
        }
        std::memcpy(error + place.first, block, place.numel * sizeof(float));
    }
}

// Writes `factor` times what the payload stands for, or adds it.
template <bool add>
void decode_e8(float* out, const std::uint8_t* payload, const ds_comm::E8Layout& layout, float factor) {
    const Words words(layout.vectors);
    alignas(64) float block[kMaxBlock];
    alignas(64) std::uint32_t found[kMaxBytes];
    for (std::size_t i = 0; i * layout.block < layout.numel; ++i) {
        const E8Place place(layout, i);
        float scale;
        std::memcpy(&scale, payload + 4 * i, 4);
        scale *= factor;
        words.read(payload + place.codes, place.bytes, found);
        for (std::uint32_t k = 0; k < 8; ++k) {
            float* const row = block + k * place.bytes;
            for (std::size_t j = 0; j < place.bytes; ++j) row[j] = value_of(found[j], k) * scale;
        }
        float* const to = out + place.first;
        for (std::size_t j = 0; j < place.numel; ++j) to[j] = add ? to[j] + block[j] : block[j];
    }
}

constexpr ds_comm::Codes<ds_comm::E8Layout> e8_codes() { return {&encode_e8, &decode_e8<false>, &decode_e8<true>}; }

}  // namespace
