// Instantiates the norms for the instruction set of the including file.
#pragma once

#include "norm.h"

#define DS_KERNELS_NORM(kernel)                                                                               \
    {{kernel<Float32, false>, kernel<Float32, true>},   {kernel<BFloat16, false>, kernel<BFloat16, true>}, \
     {kernel<Float16, false>, kernel<Float16, true>}}
#define DS_KERNELS_NORMS {DS_KERNELS_NORM(norm), DS_KERNELS_NORM(norm_backward)}
