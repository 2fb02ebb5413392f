// Instantiates the activations for the instruction set of the including file.
#pragma once

#include "bias_gelu.h"

namespace {

struct Exp {
    static float of(float x) { return exp(x); }
};
struct Sigmoid {
    static float of(float x) { return sigmoid(x); }
};
struct NormalCdf {
    static float of(float x) { return normal(x).cdf; }
};
struct NormalPdf {
    static float of(float x) { return normal(x).pdf; }
};

template <class Function>
void evaluate(const float* x, float* out, std::size_t n) {
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) out[i] = Function::of(x[i]);
}

}  // namespace

#define DS_KERNELS_GELU(kernel, Format)                                     \
    {{kernel<Format, GeluErf, false>, kernel<Format, GeluErf, true>},       \
     {kernel<Format, GeluTanh, false>, kernel<Format, GeluTanh, true>}}
#define DS_KERNELS_GELUS(kernel) \
    {DS_KERNELS_GELU(kernel, Float32), DS_KERNELS_GELU(kernel, BFloat16), DS_KERNELS_GELU(kernel, Float16)}
#define DS_KERNELS_MATH {evaluate<Exp>, evaluate<Sigmoid>, evaluate<NormalCdf>, evaluate<NormalPdf>}
#define DS_KERNELS_ACTIVATIONS \
    {DS_KERNELS_GELUS(bias_gelu), DS_KERNELS_GELUS(bias_gelu_backward), DS_KERNELS_MATH}
