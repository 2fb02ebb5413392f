// gelu(x weight^T + bias) and the sum before the GELU.
#pragma once

#include "product.cuh"

namespace ds_kernels {

struct LinearGeluArgs {
    const void* x;       // [rows, inner]
    const void* weight;  // [columns, inner]
    const void* bias;    // [columns]
    void* out;           // [rows, columns]
    void* inside;        // the same, before the GELU
    int rows;
    int columns;
    int inner;
};

template <class Element>
__device__ inline void linear_gelu(const LinearGeluArgs& args) {
    using Output = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
        Element, float, float, Element, Element, kProductAlign, cutlass::epilogue::thread::GELU<float>,
        cutlass::plus<float>, true, Element>;
    using Kernel = Product<Element, cutlass::layout::ColumnMajor, Output>;
    run_product<Kernel>(typename Kernel::Arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {args.rows, args.columns, args.inner}, 1, {1.0f, 0.0f}, args.x,
        args.weight, nullptr, args.out, const_cast<void*>(args.bias), args.inside, 0, 0, 0, 0, 0, 0, args.inner,
        args.inner, args.columns, args.columns, 0, args.columns));
}

}  // namespace ds_kernels
