// Codecs of optimizer state: what each instruction set provides.
#pragma once

#include <cstddef>

namespace ds_kernels {

// 0: float32, 1: bfloat16, 2: float16, 3: bfloat16 and the 16 bits below it, 4: int8 and scales, 5: uint8 and scales of
// roots, 6: bfloat16, rounded stochastically; see state_codecs.h and stochastic.h.
constexpr int kNumStateCodecs = 7;

// Between n floats and the elements from `begin` of an array, a multiple of 64.
using DecodeState = void (*)(const void* data, const void* extra, float* out, std::size_t begin, std::size_t n);
using EncodeState = void (*)(const float* in, void* data, void* extra, std::size_t begin, std::size_t n);

struct StateTable {
    DecodeState decode[kNumStateCodecs];
    EncodeState encode[kNumStateCodecs];
};

}  // namespace ds_kernels
