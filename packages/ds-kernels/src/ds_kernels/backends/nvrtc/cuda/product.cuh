// Matrix products from CUTLASS 2.x for tensor cores of sm_80 and later, with an epilogue.
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

constexpr int kProductAlign = 8;            // elements of an access: columns and inner are multiples
constexpr int kProductShared = 64 * 1024;  // as in backends/cutlass/linear.py

// [rows, inner] in rows times [inner, columns] in layout Right.
template <class Element, class Right, class Output>
using Product = typename cutlass::gemm::kernel::DefaultGemmWithBroadcast<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kProductAlign, Element, Right,
    cutlass::ComplexTransform::kNone, kProductAlign, Element, cutlass::layout::RowMajor, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 32>,
    cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<16, 8, 16>, Output,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, 4, cutlass::arch::OpMultiplyAdd>::GemmKernel;

template <class Kernel>
__device__ inline void run_product(const typename Kernel::Arguments& arguments) {
    static_assert(sizeof(typename Kernel::SharedStorage) <= kProductShared, "raise the shared memory of the launch");
    static_assert(Kernel::kThreadCount == 128, "change the threads of the launch");
    extern __shared__ __align__(128) char shared[];
    const typename Kernel::Params params(arguments, 1, 1);
    Kernel kernel;
    kernel(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

}  // namespace ds_kernels
