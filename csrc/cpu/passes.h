// The CPU implementation of every pass. Each instruction set's file includes this once, so that one source becomes
// one extension module per instruction set, of which one is loaded.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "mbconv.h"
#include "rmsprop.h"

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&effnet_fast::channel_stats));
  m.impl("dwconv_stats", TORCH_BOX(&effnet_fast::dwconv_stats));
  m.impl("pool", TORCH_BOX(&effnet_fast::pool));
  m.impl("apply", TORCH_BOX(&effnet_fast::apply));
  m.impl("backward_sums", TORCH_BOX(&effnet_fast::backward_sums));
  m.impl("backward_dwconv", TORCH_BOX(&effnet_fast::backward_dwconv));
  m.impl("backward_apply", TORCH_BOX(&effnet_fast::backward_apply));
  m.impl("dwconv_affine", TORCH_BOX(&effnet_fast::dwconv_affine));
  m.impl("patches", TORCH_BOX(&effnet_fast::patches));
  m.impl("pointwise_stats", TORCH_BOX(&effnet_fast::pointwise_stats));
  m.impl("pointwise_affine", TORCH_BOX(&effnet_fast::pointwise_affine));
  m.impl("backward_pointwise", TORCH_BOX(&effnet_fast::backward_pointwise));
  m.impl("batch_norm_stats", TORCH_BOX(&effnet_fast::batch_norm_stats));
  m.impl("batch_norm_grad", TORCH_BOX(&effnet_fast::batch_norm_grad));
  m.impl("squeeze_gate", TORCH_BOX(&effnet_fast::squeeze_gate));
  m.impl("squeeze_gate_grad", TORCH_BOX(&effnet_fast::squeeze_gate_grad));
  m.impl("pack_pointwise", TORCH_BOX(&effnet_fast::pack_pointwise));
  m.impl("packed_convolution", TORCH_BOX(&effnet_fast::packed_convolution));
  m.impl("block_inference", TORCH_BOX(&effnet_fast::block_inference));
  m.impl("block_forward", TORCH_BOX(&effnet_fast::block_forward));
  m.impl("block_backward", TORCH_BOX(&effnet_fast::block_backward));
  m.impl("expand_stats", TORCH_BOX(&effnet_fast::expand_stats));
  m.impl("expand_dwconv_stats", TORCH_BOX(&effnet_fast::expand_dwconv_stats));
  m.impl("backward_expand_dwconv", TORCH_BOX(&effnet_fast::backward_expand_dwconv));
  m.impl("rmsprop_step", TORCH_BOX(&effnet_fast::rmsprop_step));
}

// Importing the module registers the passes; it has nothing else to offer.
#define EFFNET_FAST_MODULE(name)                                                      \
  PyMODINIT_FUNC PyInit_##name() {                                                    \
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr}; \
    return PyModule_Create(&module);                                                  \
  }
