// Block codes of compressed messages: what each instruction set provides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ds_kernels {

// 0: sign, 1: ternary, 2: int4, 3: int8; as in backends/native/codecs.py.
constexpr int kNumCodes = 4;

// See [Note: Payload] in backends/payload.py.
struct BlockLayout {
    std::size_t numel;
    std::size_t block;       // elements that share a scale
    std::size_t num_blocks;
    int scale_format;        // float32 or float16, as in formats.h
};

// Codes blocks begin <= i < end of x, plus error where there is one; error becomes what the payload lacks.
using EncodeKernel = void (*)(const void* x, float* error, std::uint8_t* payload, const BlockLayout& layout,
                              std::size_t begin, std::size_t end);
// Writes what blocks begin <= i < end stand for.
using DecodeKernel = void (*)(void* out, const std::uint8_t* payload, const BlockLayout& layout, std::size_t begin,
                              std::size_t end);
// Adds weight times what blocks begin <= i < end stand for.
using AccumulateKernel = void (*)(float* out, const std::uint8_t* payload, const BlockLayout& layout, float weight,
                                  std::size_t begin, std::size_t end);

struct CodecTable {
    EncodeKernel encode[kNumCodes][kNumFormats];  // [code][x]
    DecodeKernel decode[kNumCodes][kNumFormats];  // [code][out]
    AccumulateKernel accumulate[kNumCodes];
};

}  // namespace ds_kernels
