// One call of a linear layer's kernel: raw addresses and sizes, so that the module sees neither torch nor CUTLASS.
#pragma once

#include <cstddef>

struct CUstream_st;

namespace ds_kernels {

struct LinearCall {
    const void* left;    // [rows, inner]: x, or the gradient
    const void* weight;  // [columns, inner] for the GELU behind it, [inner, columns] for the one before it
    const void* bias;    // [columns]; none for the GELU before it
    void* out;           // [rows, columns]
    void* inside;        // the same: what the GELU is taken of; written by linear_gelu, read by linear_dgelu
    void* workspace;
    int rows;
    int columns;
    int inner;
    int multiprocessors;
    CUstream_st* stream;
    bool check_only;  // sizes and alignment; nothing is run
};

// What is wrong, or null; the workspace in bytes.
const char* linear_gelu_bfloat16(const LinearCall& call);
const char* linear_gelu_float16(const LinearCall& call);
const char* linear_dgelu_bfloat16(const LinearCall& call);
const char* linear_dgelu_float16(const LinearCall& call);
std::size_t linear_gelu_bfloat16_workspace(const LinearCall& call);
std::size_t linear_gelu_float16_workspace(const LinearCall& call);
std::size_t linear_dgelu_bfloat16_workspace(const LinearCall& call);
std::size_t linear_dgelu_float16_workspace(const LinearCall& call);

}  // namespace ds_kernels
