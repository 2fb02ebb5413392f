// Instantiates dropout for the instruction set of the including file.
#pragma once

#include "bias_dropout.h"

#define DS_KERNELS_BIAS_DROPOUT(kernel)                                                                     \
    {{kernel<Float32, false>, kernel<Float32, true>},   {kernel<BFloat16, false>, kernel<BFloat16, true>}, \
     {kernel<Float16, false>, kernel<Float16, true>}}
#define DS_KERNELS_DROPOUTS \
    {DS_KERNELS_BIAS_DROPOUT(bias_dropout), DS_KERNELS_BIAS_DROPOUT(bias_dropout_backward)}
