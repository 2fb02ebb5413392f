// Instantiates the optimizer steps for the instruction set of the including file.
#pragma once

#include "adam.h"

#define DS_KERNELS_ADAM(Grad, Copy) {adam<Grad, Copy, false>, adam<Grad, Copy, true>}
#define DS_KERNELS_ADAM_ROW(Grad) \
    {DS_KERNELS_ADAM(Grad, Float32), DS_KERNELS_ADAM(Grad, BFloat16), DS_KERNELS_ADAM(Grad, Float16)}
#define DS_KERNELS_OPTIMIZERS \
    {{DS_KERNELS_ADAM_ROW(Float32), DS_KERNELS_ADAM_ROW(BFloat16), DS_KERNELS_ADAM_ROW(Float16)}}
