// Instantiates every kernel for the instruction set of the including file, and lists them in a table.
#pragma once

#include "activation_instances.h"
#include "codec_instances.h"
#include "dropout_instances.h"
#include "kernel_table.h"
#include "loss_instances.h"
#include "norm_instances.h"
#include "optimizer_instances.h"
#include "reduction_instances.h"
#include "softmax_instances.h"
#include "state_instances.h"

// A macro and not a function: the table must be a constant in the file, because code that runs while the
// module is loaded must not use instructions the processor may lack.
#define DS_KERNELS_TABLE(name)                                                                                    \
    {name, DS_KERNELS_ACTIVATIONS, DS_KERNELS_CODECS, DS_KERNELS_DROPOUTS, DS_KERNELS_LOSSES, DS_KERNELS_NORMS,  \
     DS_KERNELS_OPTIMIZERS, DS_KERNELS_REDUCTIONS, DS_KERNELS_SOFTMAXES, DS_KERNELS_STATES}
