// Activations: what each instruction set provides.
#pragma once

#include <cstddef>

#include "formats.h"

namespace ds_kernels {

struct BiasGeluArgs {
    const void* grad;  // of the output; backward only
    const void* x;
    const void* bias;  // one number for each column, or null
    void* out;         // the output; backward: the gradient of x
    std::size_t columns;
};

struct BiasSwigluArgs {
    const void* grad;     // of the output; backward only
    const void* x;        // rows of twice the columns
    const void* bias;     // one number for each column of x, or null
    void* out;            // the output; backward: the gradient of x
    std::size_t columns;  // of the output
};

// Elements begin <= i < end.
using BiasGeluKernel = void (*)(const BiasGeluArgs& args, std::size_t begin, std::size_t end);
// With a bias: rows begin <= i < end, whose gradients are added up in sums; without: elements.
using BiasGeluBackwardKernel = void (*)(const BiasGeluArgs& args, std::size_t begin, std::size_t end, float* sums);
// The same for SwiGLU; elements are the output's, sums those of the gate, then those of the value.
using BiasSwigluKernel = void (*)(const BiasSwigluArgs& args, std::size_t begin, std::size_t end);
using BiasSwigluBackwardKernel = void (*)(const BiasSwigluArgs& args, std::size_t begin, std::size_t end, float* sums);
// out[i] = f(x[i]) for a function of float_math.h, float32; for tests.
using MathKernel = void (*)(const float* x, float* out, std::size_t n);

struct ActivationTable {
    BiasGeluKernel bias_gelu[kNumFormats][2][2];                   // [x][tanh][has bias]
    BiasGeluBackwardKernel bias_gelu_backward[kNumFormats][2][2];  // [x][tanh][has bias]
    BiasSwigluKernel bias_swiglu[kNumFormats][2];                  // [x][has bias]
    BiasSwigluBackwardKernel bias_swiglu_backward[kNumFormats][2];
    MathKernel math[2][4];                                           // [fine]; exp, sigmoid, normal cdf, normal pdf
};

}  // namespace ds_kernels
