// Instantiates the softmax for the instruction set of the including file.
#pragma once

#include "softmax.h"

#define DS_KERNELS_SOFTMAX(kernel) {kernel<Float32>, kernel<BFloat16>, kernel<Float16>}
#define DS_KERNELS_SOFTMAXES {DS_KERNELS_SOFTMAX(softmax), DS_KERNELS_SOFTMAX(softmax_backward)}
