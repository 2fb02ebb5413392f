// The codes of [Note: Block payload] in codecs/layout.py, to the bit: included once for each instruction set.
//
// A code of a block goes from elements to what they are in scales (small whole numbers, as floats), from these to digits
// and bytes, and back. All loops run over neighbours in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "lanes.h"
#include "table.h"

namespace {

// A block while it is coded; behind its end are zeros.
struct Block {
    alignas(64) float x[kMaxBlock + kLanes];
    alignas(64) float values[kMaxBlock + kLanes];  // in scales
    alignas(64) float terms[kMaxBlock];            // of a sum
};

inline float mean_size(Block& block, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) block.terms[i] = magnitude(block.x[i]);
    return lane_sum(block.terms, n) / static_cast<float>(n);
}

// A scale as it is sent, and what it is then.
struct Stored {
    float value;
    std::uint16_t half;
};

inline Stored stored(float scale, bool float16) {
    if (!float16) return {scale, 0};
    const std::uint16_t half = to_half(scale);
    return {from_half(half), half};
}

// How elements become digits of a byte. `find` fills values and returns the scale as it is sent.

struct Sign {
    static constexpr std::size_t digits = 8;
    static constexpr unsigned base = 2;
    static constexpr float nothing = 1.0f;  // behind the end

    static Stored find(Block& block, std::size_t n, bool float16) {
        const float scale = mean_size(block, n);
        for (std::size_t i = 0; i < n; ++i) block.values[i] = block.x[i] >= 0.0f ? 1.0f : -1.0f;
        return stored(scale, float16);
    }
    static unsigned digit(float value) { return value > 0.0f ? 1u : 0u; }
    static float value(unsigned digit) { return static_cast<float>(static_cast<int>(2u * digit) - 1); }
};

struct Ternary {
    static constexpr std::size_t digits = 5;
    static constexpr unsigned base = 3;
    static constexpr float nothing = 0.0f;

    static Stored find(Block& block, std::size_t n, bool float16) {
        const float mean = mean_size(block, n);
        const float threshold = mean * 0.7f;
        for (std::size_t i = 0; i < n; ++i) {
            const float x = block.x[i];
            block.values[i] = magnitude(x) > threshold ? (x > 0.0f ? 1.0f : -1.0f) : 0.0f;
        }
        for (std::size_t i = 0; i < n; ++i) block.terms[i] = magnitude(block.values[i]);
        const float kept = lane_sum(block.terms, n);
        for (std::size_t i = 0; i < n; ++i) block.terms[i] = block.values[i] != 0.0f ? magnitude(block.x[i]) : 0.0f;
        // nothing is kept of zeros, and of what is not finite, which the mean passes on
        return stored(kept > 0.0f ? lane_sum(block.terms, n) / kept : mean, float16);
    }
    static unsigned digit(float value) { return static_cast<unsigned>(static_cast<int>(value) + 1); }
    static float value(unsigned digit) { return static_cast<float>(static_cast<int>(digit) - 1); }
};

template <int levels>
inline Stored find_integers(Block& block, std::size_t n, bool float16) {
    // bits of magnitudes have their order, and those of what is no number come last
    std::uint32_t largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t size = as_bits(block.x[i]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    constexpr float kMost = levels, kSmallest = 0x1p-126f;
    constexpr float kWhole = 0x1.8p23f;  // what is added to it is rounded to a whole number, ties to even
    const Stored scale = stored(as_float(largest) / kMost, float16);
    const float inverse = scale.value >= kSmallest ? 1.0f / scale.value : 0.0f;
    for (std::size_t i = 0; i < n; ++i) {
        const float quotient = block.x[i] * inverse;
        const float below = quotient < kMost ? quotient : kMost;  // also of what is no number
        const float within = below > -kMost ? below : -kMost;
        block.values[i] = (within + kWhole) - kWhole;
    }
    return scale;
}

struct Int4 {
    static constexpr std::size_t digits = 2;
    static constexpr unsigned base = 16;
    static constexpr float nothing = 0.0f;

    static Stored find(Block& block, std::size_t n, bool float16) { return find_integers<7>(block, n, float16); }
    static unsigned digit(float value) { return static_cast<unsigned>(static_cast<int>(value)) & 15u; }
    static float value(unsigned digit) { return static_cast<float>(static_cast<int>(digit ^ 8u) - 8); }
};

struct Int8 {
    static constexpr std::size_t digits = 1;
    static constexpr unsigned base = 256;
    static constexpr float nothing = 0.0f;

    static Stored find(Block& block, std::size_t n, bool float16) { return find_integers<127>(block, n, float16); }
    static unsigned digit(float value) { return static_cast<unsigned>(static_cast<int>(value)) & 255u; }
    static float value(unsigned digit) { return static_cast<float>(static_cast<int>(digit ^ 128u) - 128); }
};

struct BlockPlace {
    std::size_t first;  // element
    std::size_t numel;
    std::size_t scale;  // byte in the payload
    std::size_t codes;  // likewise
    std::size_t bytes;  // of codes

    BlockPlace(const ds_comm::BlockLayout& layout, std::size_t digits, std::size_t index) {
        const std::size_t num_blocks = (layout.numel + layout.block - 1) / layout.block;
        const std::size_t scale_bytes = layout.float16_scales ? 2 : 4;
        first = index * layout.block;
        numel = layout.numel - first < layout.block ? layout.numel - first : layout.block;
        scale = scale_bytes * index;
        codes = scale_bytes * num_blocks + index * ((layout.block + digits - 1) / digits);
        bytes = (numel + digits - 1) / digits;
    }
};

// values: digits times `bytes`, digit i of byte j at i * bytes + j.
template <class Code>
inline void pack(const float* values, std::uint8_t* codes, std::size_t bytes) {
    std::uint32_t sums[kMaxBlock];
    for (std::size_t j = 0; j < bytes; ++j) sums[j] = Code::digit(values[j]);
    for (std::size_t i = 1, power = Code::base; i < Code::digits; ++i, power *= Code::base) {
        const auto factor = static_cast<std::uint32_t>(power);
        for (std::size_t j = 0; j < bytes; ++j) sums[j] += factor * Code::digit(values[i * bytes + j]);
    }
    for (std::size_t j = 0; j < bytes; ++j) codes[j] = static_cast<std::uint8_t>(sums[j]);
}

// The inverse, times the scale.
template <class Code>
inline void unpack(const std::uint8_t* codes, float* out, std::size_t bytes, float scale) {
    std::uint32_t left[kMaxBlock];
    for (std::size_t j = 0; j < bytes; ++j) left[j] = codes[j];
    for (std::size_t i = 0; i < Code::digits; ++i) {
        for (std::size_t j = 0; j < bytes; ++j) {
            // divided by 3 where needed: by a product, exact below 512
            const std::uint32_t rest = Code::base == 3 ? left[j] * 171u >> 9 : left[j] / Code::base;
            out[i * bytes + j] = Code::value(left[j] - Code::base * rest) * scale;
            left[j] = rest;
        }
    }
}

template <class Code>
void encode_blocks(const float* x, float* error, std::uint8_t* payload, const ds_comm::BlockLayout& layout) {
    Block block;
    for (std::size_t index = 0; index * layout.block < layout.numel; ++index) {
        const BlockPlace at(layout, Code::digits, index);
        read_block(x + at.first, error == nullptr ? nullptr : error + at.first, at.numel, block.x);
        const Stored scale = Code::find(block, at.numel, layout.float16_scales);
        for (std::size_t i = at.numel; i < Code::digits * at.bytes; ++i) block.values[i] = Code::nothing;
        pack<Code>(block.values, payload + at.codes, at.bytes);
        if (layout.float16_scales) {
            std::memcpy(payload + at.scale, &scale.half, sizeof scale.half);
        } else {
            std::memcpy(payload + at.scale, &scale.value, sizeof scale.value);
        }
        if (error == nullptr) continue;
        float* const owed = error + at.first;
        for (std::size_t i = 0; i < at.numel; ++i) owed[i] = block.x[i] - block.values[i] * scale.value;
    }
}

// Writes `factor` times what the payload stands for, or adds it.
template <class Code, bool add>
void decode_blocks(float* out, const std::uint8_t* payload, const ds_comm::BlockLayout& layout, float factor) {
    alignas(64) float block[kMaxBlock + kLanes];
    for (std::size_t index = 0; index * layout.block < layout.numel; ++index) {
        const BlockPlace at(layout, Code::digits, index);
        float scale;
        if (layout.float16_scales) {
            std::uint16_t half;
            std::memcpy(&half, payload + at.scale, sizeof half);
            scale = from_half(half);
        } else {
            std::memcpy(&scale, payload + at.scale, sizeof scale);
        }
        unpack<Code>(payload + at.codes, block, at.bytes, scale * factor);
        float* const to = out + at.first;
        for (std::size_t i = 0; i < at.numel; ++i) to[i] = add ? to[i] + block[i] : block[i];
    }
}

template <class Code>
constexpr ds_comm::Codes<ds_comm::BlockLayout> codes_of() {
    return {&encode_blocks<Code>, &decode_blocks<Code, false>, &decode_blocks<Code, true>};
}

// In the order of kBlockCodes.
constexpr ds_comm::Codes<ds_comm::BlockLayout> kCodes[] = {codes_of<Sign>(), codes_of<Ternary>(), codes_of<Int4>(),
                                                           codes_of<Int8>()};

void encode_any(const float* x, float* error, std::uint8_t* payload, const ds_comm::BlockLayout& layout) {
    kCodes[layout.code].encode(x, error, payload, layout);
}

void decode_any(float* out, const std::uint8_t* payload, const ds_comm::BlockLayout& layout, float factor) {
    kCodes[layout.code].decode(out, payload, layout, factor);
}

void accumulate_any(float* out, const std::uint8_t* payload, const ds_comm::BlockLayout& layout, float factor) {
    kCodes[layout.code].accumulate(out, payload, layout, factor);
}

constexpr ds_comm::Codes<ds_comm::BlockLayout> block_codes() { return {&encode_any, &decode_any, &accumulate_any}; }

}  // namespace
