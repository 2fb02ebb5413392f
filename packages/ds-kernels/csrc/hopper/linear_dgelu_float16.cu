#include "linear_dgelu.cuh"

namespace ds_kernels {

using Layer = LinearDGelu<cutlass::half_t>;

const char* linear_dgelu_float16(const LinearCall& call) { return Layer::run(call); }
std::size_t linear_dgelu_float16_workspace(const LinearCall& call) { return Layer::workspace(call); }

}  // namespace ds_kernels
