// gelu(x weight^T + bias) and the sum before the GELU for Hopper, from CUTLASS 3.x: TMA loads, warp-specialised groups
// of threads that share a persistent tile loop, tensor cores by WGMMA.
//
// The epilogue is a tree of visitors over the accumulator: add the bias, store the sum, apply the GELU; each tile of
// both results leaves through shared memory by TMA. Both are written once, and nothing is read but the bias.
#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_store_tma_warpspecialized.hpp>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "call.h"

namespace ds_kernels {

template <class Element>
struct LinearGelu {
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
    using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two tiles that share columns read the weight once
    using Schedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
    using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
    static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
    static constexpr int kAlign = 8;  // elements of 16 bytes

    template <class Node, class... Children>
    using Tree = cutlass::epilogue::fusion::Sm90EVT<Node, Children...>;
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

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float, float, void, Row, kAlign,
        Element, Row, kAlign, Schedule, Out>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlign, Element, Column, kAlign, float, Tile,
        Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static typename Gemm::Arguments arguments(const LinearCall& call) {
        const auto stride_x = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {call.rows, call.inner, 1});
        const auto stride_w = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {call.columns, call.inner, 1});
        const auto stride_out = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {call.rows, call.columns, 1});
        typename Gemm::Arguments args{cutlass::gemm::GemmUniversalMode::kGemm,
                                      {call.rows, call.columns, call.inner, 1},
                                      {static_cast<const Element*>(call.x), stride_x,
                                       static_cast<const Element*>(call.weight), stride_w},
                                      {{}, nullptr, {}, static_cast<Element*>(call.out), stride_out}};
        // Children before their node: ((bias, accumulator, plus), store), GELU.
        args.epilogue.thread = {{{{static_cast<const Element*>(call.bias), Element(0), {}}, {}, {}},
                                 {static_cast<Element*>(call.inside), stride_out}},
                                {}};
        args.hw_info.device_id = 0;  // sm_count is given, so that no device is asked
        args.hw_info.sm_count = call.multiprocessors;
        return args;
    }

    static const char* run(const LinearCall& call) {
        const typename Gemm::Arguments args = arguments(call);
        cutlass::Status status = Gemm::can_implement(args);
        if (status == cutlass::Status::kSuccess && !call.check_only) {
            Gemm gemm;
            status = gemm.initialize(args, call.workspace, call.stream);
            if (status == cutlass::Status::kSuccess) status = gemm.run(call.stream);
        }
        return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
    }

    static std::size_t workspace(const LinearCall& call) { return Gemm::get_workspace_size(arguments(call)); }
};

}  // namespace ds_kernels
