// What the passes are given besides activations: pointers to fp32 tensors, [C] unless stated, and null where absent.
#pragma once

namespace effnet_fast {

// SiLU(u) or u, times gate; u = y * scale + shift.
struct ApplyOperands {
  const float *scale, *shift;
  const float* gate;  // [N, C] or null
  bool silu;
};

// Gradient of a BatchNorm's input: du * scale + (y - mean) * b + a with du = (grad * gate + pooled_grad), times
// SiLU'(y * scale + shift) if silu.
struct OutputGrad {
  const float *scale, *shift, *mean, *a, *b;
  const float *gate, *pooled_grad;  // [N, C] or null
  bool silu;
};

// A BatchNorm: u = y * scale + shift, hat = (y - mean) * rstd.
struct Normalization {
  const float *scale, *shift, *mean, *rstd;
};

// SiLU(x * scale + shift) on load, or x itself where scale is null.
struct InputAffine {
  const float *scale, *shift;
};

// Squeeze-excite's MLP: reduce [squeezed, C] and expand [C, squeezed].
struct SqueezeWeights {
  const float *reduce, *reduce_bias, *expand, *expand_bias;
  int channels, squeezed;
};
struct SqueezeGrads {
  float *reduce, *reduce_bias, *expand, *expand_bias;
};

}  // namespace effnet_fast
