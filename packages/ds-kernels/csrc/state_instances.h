// Instantiates the codecs for the instruction set of the including file.
#pragma once

#include "state_codecs.h"
#include "stochastic.h"

#define DS_KERNELS_STATES                                                                                              \
    {                                                                                                                  \
        {decode_format<Float32>, decode_format<BFloat16>, decode_format<Float16>, decode_split, decode_signed,         \
         decode_root, decode_format<BFloat16>},                                                                        \
        {                                                                                                              \
            encode_format<Float32>, encode_format<BFloat16>, encode_format<Float16>, encode_split, encode_signed,      \
                encode_root, encode_stochastic                                                                         \
        }                                                                                                              \
    }
