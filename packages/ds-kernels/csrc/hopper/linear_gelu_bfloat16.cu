#include "linear_gelu.cuh"

namespace ds_kernels {

using Layer = LinearGelu<cutlass::bfloat16_t>;

const char* linear_gelu_bfloat16(const LinearCall& call) { return Layer::run(call); }
std::size_t linear_gelu_bfloat16_workspace(const LinearCall& call) { return Layer::workspace(call); }

}  // namespace ds_kernels
