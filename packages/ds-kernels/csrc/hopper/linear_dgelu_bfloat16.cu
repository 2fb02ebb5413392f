#include "linear_dgelu.cuh"

namespace ds_kernels {

using Layer = LinearDGelu<cutlass::bfloat16_t>;

const char* linear_dgelu_bfloat16(const LinearCall& call) { return Layer::run(call); }
std::size_t linear_dgelu_bfloat16_workspace(const LinearCall& call) { return Layer::workspace(call); }

}  // namespace ds_kernels
