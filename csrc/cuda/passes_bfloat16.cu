#include "launch.cuh"

template struct effnet_fast::Passes<__nv_bfloat16>;
