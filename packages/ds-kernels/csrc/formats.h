// Numbers of the storage formats, as in backends/native/module.py.
#pragma once

namespace ds_kernels {

// 0: float32, 1: bfloat16, 2: float16.
constexpr int kNumFormats = 3;

}  // namespace ds_kernels
