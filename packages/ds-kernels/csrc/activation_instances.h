// Instantiates the activations for the instruction set of the including file.
#pragma once

#include "bias_gelu.h"
#include "bias_swiglu.h"

namespace {

template <bool fine>
struct Exp {
    static float of(float x) { return exp<fine>(x); }
};
template <bool fine>
struct Sigmoid {
    static float of(float x) { return sigmoid<fine>(x); }
};
template <bool fine>
struct NormalCdf {
    static float of(float x) { return normal_cdf<fine>(x); }
};
template <bool fine>
struct NormalPdf {
    static float of(float x) { return normal<fine>(x).bell * Normal::kDensity; }
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
#define DS_KERNELS_SWIGLUS(kernel)                                                                            \
    {{kernel<Float32, false>, kernel<Float32, true>},   {kernel<BFloat16, false>, kernel<BFloat16, true>}, \
     {kernel<Float16, false>, kernel<Float16, true>}}
#define DS_KERNELS_MATH(fine) \
    {evaluate<Exp<fine>>, evaluate<Sigmoid<fine>>, evaluate<NormalCdf<fine>>, evaluate<NormalPdf<fine>>}
#define DS_KERNELS_ACTIVATIONS \
    {DS_KERNELS_GELUS(bias_gelu), DS_KERNELS_GELUS(bias_gelu_backward), DS_KERNELS_SWIGLUS(bias_swiglu), \
     DS_KERNELS_SWIGLUS(bias_swiglu_backward), {DS_KERNELS_MATH(false), DS_KERNELS_MATH(true)}}
