// Instantiates the block codes for the instruction set of the including file.
#pragma once

#include "block_codec.h"

#define DS_KERNELS_ENCODE(Code) {encode_blocks<Code, Float32>, encode_blocks<Code, BFloat16>, encode_blocks<Code, Float16>}
#define DS_KERNELS_DECODE(Code) {decode_blocks<Code, Float32>, decode_blocks<Code, BFloat16>, decode_blocks<Code, Float16>}
#define DS_KERNELS_CODECS                                                                                        \
    {                                                                                                            \
        {DS_KERNELS_ENCODE(SignCode), DS_KERNELS_ENCODE(TernaryCode), DS_KERNELS_ENCODE(IntCode<4>),             \
         DS_KERNELS_ENCODE(IntCode<8>)},                                                                         \
        {DS_KERNELS_DECODE(SignCode), DS_KERNELS_DECODE(TernaryCode), DS_KERNELS_DECODE(IntCode<4>),             \
         DS_KERNELS_DECODE(IntCode<8>)},                                                                         \
        {                                                                                                        \
            accumulate_blocks<SignCode>, accumulate_blocks<TernaryCode>, accumulate_blocks<IntCode<4>>,          \
                accumulate_blocks<IntCode<8>>                                                                    \
        }                                                                                                        \
    }
