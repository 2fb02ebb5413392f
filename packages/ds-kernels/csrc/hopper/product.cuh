// Matrix products for Hopper from CUTLASS 3.x: TMA loads, warp-specialised groups of threads that share a persistent tile
// loop, tensor cores by WGMMA; a tree of visitors over the accumulator as epilogue.
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

using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two tiles that share columns read the weight once
using Schedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kAlign = 8;  // elements of 16 bytes

template <class Node, class... Children>
using Tree = cutlass::epilogue::fusion::Sm90EVT<Node, Children...>;

// [rows, inner] in rows times [inner, columns] in layout Right; Source (void: none) is read by the epilogue.
template <class Element, class Right, class Source, class Out>
struct Product {
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float, float, Source, Row, kAlign,
        Element, Row, kAlign, Schedule, Out>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlign, Element, Right, kAlign, float, Tile,
        Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    using Arguments = typename Gemm::Arguments;

    static auto out_stride(const LinearCall& call) {
        return cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {call.rows, call.columns, 1});
    }

    // All but what the epilogue's nodes need.
    static Arguments arguments(const LinearCall& call, const Source* source) {
        const auto left = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {call.rows, call.inner, 1});
        const auto right = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {call.columns, call.inner, 1});
        Arguments args{cutlass::gemm::GemmUniversalMode::kGemm,
                       {call.rows, call.columns, call.inner, 1},
                       {static_cast<const Element*>(call.left), left, static_cast<const Element*>(call.weight), right},
                       {{}, source, {}, static_cast<Element*>(call.out), out_stride(call)}};
        if constexpr (!std::is_void_v<Source>) {
            args.epilogue.dC = cutlass::make_cute_packed_stride(typename Kernel::StrideC{}, {call.rows, call.columns, 1});
        }
        args.hw_info.device_id = 0;  // sm_count is given, so that no device is asked
        args.hw_info.sm_count = call.multiprocessors;
        return args;
    }

    static const char* run(const LinearCall& call, const Arguments& args) {
        cutlass::Status status = Gemm::can_implement(args);
        if (status == cutlass::Status::kSuccess && !call.check_only) {
            Gemm gemm;
            status = gemm.initialize(args, call.workspace, call.stream);
            if (status == cutlass::Status::kSuccess) status = gemm.run(call.stream);
        }
        return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
    }
};

}  // namespace ds_kernels
