// (grad weight) * gelu'(inside): the gradient before a GELU, from that behind the layer after it.
#pragma once

#include "gelu.cuh"
#include "product.cuh"

namespace ds_kernels {

struct LinearDGeluArgs {
    const void* grad;    // [rows, inner]
    const void* weight;  // [inner, columns]
    const void* inside;  // [rows, columns]: what the GELU was taken of
    void* out;           // the same
    int rows;
    int columns;
    int inner;
};

// An epilogue that multiplies the product by the slope of the GELU at the source.
template <class Element>
struct TimesSlope
    : cutlass::epilogue::thread::LinearCombinationBiasElementwise<
          Element, float, float, Element, Element, kProductAlign, cutlass::epilogue::thread::Identity<float>,
          cutlass::plus<float>, false, Element> {
    using Base = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
        Element, float, float, Element, Element, kProductAlign, cutlass::epilogue::thread::Identity<float>,
        cutlass::plus<float>, false, Element>;
    using Base::Base;
    using Base::operator();  // without a source: never called, for beta is 1

    CUTLASS_DEVICE void operator()(typename Base::FragmentZ& out, typename Base::FragmentT&,
                                   const typename Base::FragmentAccumulator& product,
                                   const typename Base::FragmentC& source,
                                   const typename Base::FragmentCompute&) const {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kProductAlign; ++i) {
            const float slope = Erf::slope(static_cast<float>(source[i]));
            out[i] = static_cast<Element>(static_cast<float>(product[i]) * slope);
        }
    }
};

template <class Element>
__device__ inline void linear_dgelu(const LinearDGeluArgs& args) {
    using Kernel = Product<Element, cutlass::layout::RowMajor, TimesSlope<Element>>;
    run_product<Kernel>(typename Kernel::Arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {args.rows, args.columns, args.inner}, 1, {1.0f, 1.0f}, args.grad,
        args.weight, const_cast<void*>(args.inside), args.out, nullptr, nullptr, 0, 0, 0, 0, 0, 0, args.inner,
        args.columns, args.columns, args.columns, 0, 0));
}

}  // namespace ds_kernels
