// Codes blocks of floats into bytes and back, with error feedback, in one pass over memory.
//
// The layout is that of [Note: Payload] in backends/payload.py: byte j of a block holds the elements j, j + m, j + 2m, ...
// of m bytes, so that all loops run over consecutive elements. A block passes through a buffer in the first-level cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "block_codes.h"
#include "codec_table.h"
#include "float_format.h"

namespace {

constexpr std::size_t kMaxBlock = 1024;
constexpr std::size_t kBlockBuffer = kMaxBlock + kCodeLanes;

template <class Code>
constexpr std::size_t code_bytes(std::size_t numel) {
    return (numel + Code::kDigits - 1) / Code::kDigits;
}

constexpr std::uint32_t power(std::uint32_t base, unsigned exponent) {
    return exponent == 0 ? 1u : base * power(base, exponent - 1);
}

// A block's place.
template <class Code>
struct Place {
    std::size_t first;  // element
    std::size_t numel;
    std::size_t scale;  // byte in the payload
    std::size_t codes;  // byte in the payload
    std::size_t bytes;  // of codes

    Place(const ds_kernels::BlockLayout& layout, std::size_t index) {
        const std::size_t scale_bytes = layout.scale_format == 0 ? 4 : 2;
        first = index * layout.block;
        numel = layout.numel - first < layout.block ? layout.numel - first : layout.block;
        scale = index * scale_bytes;
        codes = layout.num_blocks * scale_bytes + index * code_bytes<Code>(layout.block);
        bytes = code_bytes<Code>(numel);
    }
};

// Writes the scale, and returns what a reader will find.
inline float store_scale(std::uint8_t* to, float scale, int format) {
    if (format == 0) {
        std::memcpy(to, &scale, 4);
        return scale;
    }
    constexpr float kLargest = 65504.0f;  // a larger scale would be infinite, and all it multiplies lost
    const bool saturates = scale > kLargest && scale < __builtin_inff();
    const std::uint16_t half = Float16::narrow(saturates ? kLargest : scale);
    std::memcpy(to, &half, 2);
    return Float16::widen(half);
}

inline float load_scale(const std::uint8_t* from, int format) {
    if (format == 0) {
        float scale;
        std::memcpy(&scale, from, 4);
        return scale;
    }
    std::uint16_t half;
    std::memcpy(&half, from, 2);
    return Float16::widen(half);
}

// Digits k and up of byte j, times their powers of the base; what they leave of the elements takes their place.
template <class Code, unsigned k = 0>
inline std::uint32_t take_digits(float* x, std::size_t j, std::size_t bytes, const Fit& fit) {
    if constexpr (k == Code::kDigits) {
        return 0;
    } else {
        float& element = x[k * bytes + j];
        const std::uint32_t digit = Code::digit(element, fit);
        element = element - fit.scale * Code::value(digit);
        return digit * power(Code::kBase, k) + take_digits<Code, k + 1>(x, j, bytes, fit);
    }
}

template <class Code, unsigned k = 0>
inline void put_digits(float* x, std::size_t j, std::size_t bytes, std::uint32_t code, float scale) {
    if constexpr (k < Code::kDigits) {
        // 171 / 512 for 1 / 3: exact for one byte, and a cheaper multiplication.
        const std::uint32_t rest = Code::kBase == 3 ? (code * 171u) >> 9 : code / Code::kBase;
        x[k * bytes + j] = scale * Code::value(code - rest * Code::kBase);
        put_digits<Code, k + 1>(x, j, bytes, rest, scale);
    }
}

template <class Code, class X>
void encode_blocks(const void* x_data, float* error, std::uint8_t* payload, const ds_kernels::BlockLayout& layout,
                   std::size_t begin, std::size_t end) {
    constexpr float kSmallestNormal = 0x1p-126f;  // below, the inverse would be infinite
    alignas(64) float block[kBlockBuffer];
    for (std::size_t i = begin; i < end; ++i) {
        const Place<Code> place(layout, i);
        const auto* const x = static_cast<const typename X::Storage*>(x_data) + place.first;
        const std::size_t padded = (place.numel + kCodeLanes - 1) / kCodeLanes * kCodeLanes;
        for (std::size_t j = place.numel; j < padded + Code::kDigits; ++j) block[j] = 0.0f;
        if (error == nullptr) {
            for (std::size_t j = 0; j < place.numel; ++j) block[j] = X::widen(x[j]);
        } else {
            const float* const e = error + place.first;
            for (std::size_t j = 0; j < place.numel; ++j) block[j] = X::widen(x[j]) + e[j];
        }
        const Fit found = Code::fit(block, padded, place.numel);
        const float scale = store_scale(payload + place.scale, found.scale, layout.scale_format);
        const Fit fit{scale, scale >= kSmallestNormal ? 1.0f / scale : 0.0f, found.threshold};
        std::uint8_t* const codes = payload + place.codes;
        const std::size_t bytes = place.bytes;
#pragma omp simd
        for (std::size_t j = 0; j < bytes; ++j) {
            codes[j] = static_cast<std::uint8_t>(take_digits<Code>(block, j, bytes, fit));
        }
        if (error != nullptr) std::memcpy(error + place.first, block, place.numel * sizeof(float));
    }
}

// Calls body(first element, number of elements, their values) on block after block.
template <class Code, class Body>
inline void for_decoded(const std::uint8_t* payload, const ds_kernels::BlockLayout& layout, float weight,
                        std::size_t begin, std::size_t end, const Body& body) {
    alignas(64) float block[kBlockBuffer];
    for (std::size_t i = begin; i < end; ++i) {
        const Place<Code> place(layout, i);
        const float scale = weight * load_scale(payload + place.scale, layout.scale_format);
        const std::uint8_t* const codes = payload + place.codes;
        const std::size_t bytes = place.bytes;
#pragma omp simd
        for (std::size_t j = 0; j < bytes; ++j) put_digits<Code>(block, j, bytes, codes[j], scale);
        body(place.first, place.numel, block);
    }
}

template <class Code, class Out>
void decode_blocks(void* out_data, const std::uint8_t* payload, const ds_kernels::BlockLayout& layout,
                   std::size_t begin, std::size_t end) {
    for_decoded<Code>(payload, layout, 1.0f, begin, end, [&](std::size_t first, std::size_t n, const float* values) {
        auto* const out = static_cast<typename Out::Storage*>(out_data) + first;
#pragma omp simd
        for (std::size_t j = 0; j < n; ++j) out[j] = Out::narrow(values[j]);
    });
}

template <class Code>
void accumulate_blocks(float* out_data, const std::uint8_t* payload, const ds_kernels::BlockLayout& layout,
                       float weight, std::size_t begin, std::size_t end) {
    for_decoded<Code>(payload, layout, weight, begin, end, [&](std::size_t first, std::size_t n, const float* values) {
        float* const out = out_data + first;
#pragma omp simd
        for (std::size_t j = 0; j < n; ++j) out[j] = out[j] + values[j];
    });
}

}  // namespace
