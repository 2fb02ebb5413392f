// gelu(x weight^T + bias) and the sum before the GELU.
//
// The epilogue's tree: add the bias, store the sum, apply the GELU; each tile of both results leaves through shared memory
// by TMA. Both are written once, and nothing is read but the bias.
#pragma once

#include "product.cuh"

namespace ds_kernels {

template <class Element>
struct LinearGelu {
    using Descriptor =
        cutlass::epilogue::collective::detail::EpilogueDescriptor<Tile, EpilogueTile, void, Element, Schedule>;
    using Aux = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, Row, Element>;
    using Sum = Tree<cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, float, float, kRound>,
                     cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element, float>,
                     cutlass::epilogue::fusion::Sm90AccFetch>;
    using Kept = Tree<cutlass::epilogue::fusion::Sm90AuxStore<Aux::Stages, typename Aux::EpilogueTile, Element, kRound,
                                                              typename Aux::Stride, typename Aux::SmemLayoutAtom,
                                                              typename Aux::CopyOpR2S>,
                      Sum>;
    using Out = Tree<cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::GELU, Element, float, kRound>, Kept>;
    using Base = Product<Element, Column, void, Out>;

    static typename Base::Arguments arguments(const LinearCall& call) {
        typename Base::Arguments args = Base::arguments(call, nullptr);
        // Children before their node: ((bias, accumulator, plus), store), GELU.
        args.epilogue.thread = {{{{static_cast<const Element*>(call.bias), Element(0), {}}, {}, {}},
                                 {static_cast<Element*>(call.inside), Base::out_stride(call)}},
                                {}};
        return args;
    }

    static const char* run(const LinearCall& call) { return Base::run(call, arguments(call)); }
    static std::size_t workspace(const LinearCall& call) { return Base::Gemm::get_workspace_size(arguments(call)); }
};

}  // namespace ds_kernels
