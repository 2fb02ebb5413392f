// Instantiates the optimizer steps for the instruction set of the including file.
#pragma once

#include "adam.h"
#include "elementwise_steps.h"
#include "lamb.h"

#define DS_KERNELS_OPTIMIZERS                                                                                        \
    {                                                                                                                \
        {adam<false>, adam<true>}, lion, adagrad, {sgd<false, false>, sgd<true, false>, sgd<true, true>},            \
            lamb_moments, lamb_step                                                                                  \
    }
