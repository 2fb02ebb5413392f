// What each instruction set provides: one table for each family of kernels, all with the same meaning and the same bits.
#pragma once

#include "activation_table.h"
#include "codec_table.h"
#include "dropout_table.h"
#include "loss_table.h"
#include "norm_table.h"
#include "optimizer_table.h"
#include "reduction_table.h"
#include "softmax_table.h"
#include "state_table.h"

namespace ds_kernels {

struct KernelTable {
    const char* name;
    ActivationTable activations;
    CodecTable codecs;
    DropoutTable dropout;
    LossTable losses;
    NormTable norms;
    OptimizerTable optimizers;
    ReductionTable reductions;
    SoftmaxTable softmaxes;
    StateTable states;
};

extern const KernelTable kScalarKernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define DS_KERNELS_X86 1
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace ds_kernels
