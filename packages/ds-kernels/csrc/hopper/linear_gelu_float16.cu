#include "linear_gelu.cuh"

namespace ds_kernels {

using Layer = LinearGelu<cutlass::half_t>;

const char* linear_gelu_float16(const LinearCall& call) { return Layer::run(call); }
std::size_t linear_gelu_float16_workspace(const LinearCall& call) { return Layer::workspace(call); }

}  // namespace ds_kernels
