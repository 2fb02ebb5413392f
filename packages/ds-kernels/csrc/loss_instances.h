// Instantiates the losses for the instruction set of the including file.
#pragma once

#include "cross_entropy.h"

#define DS_KERNELS_LOSSES \
    { {cross_entropy<Float32>, cross_entropy<BFloat16>, cross_entropy<Float16>} }
