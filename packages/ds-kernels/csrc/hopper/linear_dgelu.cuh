// (grad weight) * gelu'(inside): the gradient before a GELU, from that behind the layer after it.
//
// The epilogue's tree: the accumulator times the slope at what a tile of `inside`, loaded by TMA, holds.
#pragma once

#include "product.cuh"

namespace ds_kernels {

template <class T>
struct TimesSlope {
    CUTLASS_HOST_DEVICE T operator()(const T& grad, const T& z) const {
        const T cdf = T(0.5f) * (T(1.0f) + erff(z * T(0x1.6a09e6p-1f)));             // 1 / sqrt(2)
        const T density = T(0x1.988454p-2f) * cutlass::fast_exp(T(-0.5f) * z * z);  // 1 / sqrt(2 pi)
        return grad * (cdf + z * density);
    }
};

template <class T, int size>
struct TimesSlope<cutlass::Array<T, size>> {
    CUTLASS_HOST_DEVICE cutlass::Array<T, size> operator()(const cutlass::Array<T, size>& grad,
                                                           const cutlass::Array<T, size>& z) const {
        cutlass::Array<T, size> out;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size; ++i) {
            out[i] = TimesSlope<T>()(grad[i], z[i]);
        }
        return out;
    }
};

template <class Element>
struct LinearDGelu {
    using Out = Tree<cutlass::epilogue::fusion::Sm90Compute<TimesSlope, Element, float, kRound>,
                     cutlass::epilogue::fusion::Sm90AccFetch, cutlass::epilogue::fusion::Sm90SrcFetch<Element>>;
    using Base = Product<Element, Row, Element, Out>;

    static typename Base::Arguments arguments(const LinearCall& call) {
        return Base::arguments(call, static_cast<const Element*>(call.inside));  // the tree's nodes need nothing
    }

    static const char* run(const LinearCall& call) { return Base::run(call, arguments(call)); }
    static std::size_t workspace(const LinearCall& call) { return Base::Gemm::get_workspace_size(arguments(call)); }
};

}  // namespace ds_kernels
