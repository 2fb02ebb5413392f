// The GELU, by the normal distribution's function or its approximation by tanh, and their slopes.
#pragma once

namespace ds_kernels {

struct Erf {
    __device__ static float value(float u) { return 0.5f * u * (1.0f + erff(u * 0.70710678118654752f)); }
    __device__ static float slope(float u) {
        const float cdf = 0.5f * (1.0f + erff(u * 0.70710678118654752f));
        return fmaf(u * 0.39894228040143268f, expf(-0.5f * u * u), cdf);
    }
};

struct Tanh {
    __device__ static float inner(float u) { return 0.79788456080286536f * fmaf(0.044715f * u * u, u, u); }
    __device__ static float value(float u) { return 0.5f * u * (1.0f + tanhf(inner(u))); }
    __device__ static float slope(float u) {
        const float t = tanhf(inner(u));
        const float inner_slope = 0.79788456080286536f * fmaf(0.134145f * u, u, 1.0f);
        return fmaf(0.5f * u * inner_slope, 1.0f - t * t, 0.5f * (1.0f + t));
    }
};

}  // namespace ds_kernels
