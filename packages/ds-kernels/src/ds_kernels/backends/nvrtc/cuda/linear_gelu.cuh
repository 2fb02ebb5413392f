// gelu(x weight^T + bias) and the sum before the GELU, from CUTLASS 2.x for tensor cores of sm_80 and later.
//
// CUTLASS's parameters are made in the kernel, from plain pointers and sizes, so no C++ runs on the host.
#pragma once

#include <cuda/std/cstdint>
#include <cuda/std/tuple>
#include <cuda/std/type_traits>
#include <cuda/std/utility>

#if defined(__CUDACC_RTC__)
// NVRTC's own <type_traits> lacks what CUTLASS takes from std.
namespace std {
using ::cuda::std::is_pointer_v;
using ::cuda::std::void_t;
}  // namespace std
#endif

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/epilogue/thread/linear_combination_bias_elementwise.h>
#include <cutlass/gemm/kernel/default_gemm_with_broadcast.h>

#include "kernel.cuh"

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

constexpr int kLinearAlign = 8;             // elements of an access: columns and inner are multiples
constexpr int kLinearShared = 64 * 1024;  // as in backends/cutlass/linear.py

template <class Element>
__device__ inline void linear_gelu(const LinearGeluArgs& args) {
    namespace gemm = cutlass::gemm;
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    constexpr auto kPlain = cutlass::ComplexTransform::kNone;
    using Output = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
        Element, float, float, Element, Element, kLinearAlign, cutlass::epilogue::thread::GELU<float>,
        cutlass::plus<float>, true, Element>;
    using Kernel = typename gemm::kernel::DefaultGemmWithBroadcast<
        Element, Row, kPlain, kLinearAlign, Element, Column, kPlain, kLinearAlign, Element, Row, float,
        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, gemm::GemmShape<128, 128, 32>, gemm::GemmShape<64, 64, 32>,
        gemm::GemmShape<16, 8, 16>, Output, gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, 4,
        cutlass::arch::OpMultiplyAdd>::GemmKernel;
    static_assert(sizeof(typename Kernel::SharedStorage) <= kLinearShared, "raise the shared memory of the launch");
    static_assert(Kernel::kThreadCount == 128, "change the threads of the launch");
    extern __shared__ __align__(128) char shared[];
    const typename Kernel::Arguments arguments(
        gemm::GemmUniversalMode::kGemm, {args.rows, args.columns, args.inner}, 1, {1.0f, 0.0f}, args.x, args.weight,
        nullptr, args.out, const_cast<void*>(args.bias), args.inside, 0, 0, 0, 0, 0, 0, args.inner, args.inner,
        args.columns, args.columns, 0, args.columns);
    const typename Kernel::Params params(arguments, 1, 1);
    Kernel kernel;
    kernel(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

}  // namespace ds_kernels
