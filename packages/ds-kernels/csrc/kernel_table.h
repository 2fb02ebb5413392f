// What each instruction set provides: one table of kernels, all with the same meaning and the same bits.
#pragma once

#include <cstddef>

namespace ds_kernels {

// The numbers of one Adam step, rounded to float32 once.
struct AdamScalars {
    float scale;           // factor on the gradient
    float decay;           // decoupled: 1 - lr * weight_decay, factor on the parameter; else weight_decay
    float grad_weight;     // coefficient of (grad - exp_avg), see adam.h
    unsigned from_grad;    // all ones: exp_avg moves back from the gradient; zero: on from its old value
    float beta2;
    float one_minus_beta2;
    float eps;             // eps * sqrt(1 - beta2^step)
    float minus_step_size; // -lr / (1 - beta1^step) * sqrt(1 - beta2^step)
};

struct AdamArgs {
    float* param;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* copy;
    AdamScalars scalars;
};

// Formats are numbered 0: float32, 1: bfloat16, 2: float16, as in backends/cpu.py.
constexpr int kNumFormats = 3;

// Kernels work on elements (chunks, for chunk_sumsq) begin <= i < end.
using AdamKernel = void (*)(const AdamArgs& args, std::size_t begin, std::size_t end);
using TreeSumKernel = void (*)(void* out, const void* const* pieces, std::size_t num_pieces, std::size_t begin,
                               std::size_t end);
using ChunkSumsqKernel = void (*)(const void* x, double* sums, std::size_t chunk, std::size_t begin,
                                  std::size_t end);

struct KernelTable {
    const char* name;
    AdamKernel adam[kNumFormats][kNumFormats][2];      // [gradient][copy, 0 for none][decoupled]
    TreeSumKernel tree_sum[kNumFormats][kNumFormats];  // [pieces][out]
    ChunkSumsqKernel chunk_sumsq[kNumFormats];         // [x]
};

extern const KernelTable kScalarKernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define DS_KERNELS_X86 1
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace ds_kernels
