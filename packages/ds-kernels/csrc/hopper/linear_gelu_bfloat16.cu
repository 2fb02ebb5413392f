#include "linear_gelu.cuh"

namespace ds_kernels {

using Product = LinearGelu<cutlass::bfloat16_t>;

const char* linear_gelu_bfloat16(const LinearCall& call) { return Product::run(call); }
std::size_t linear_gelu_bfloat16_workspace(const LinearCall& call) { return Product::workspace(call); }

}  // namespace ds_kernels
