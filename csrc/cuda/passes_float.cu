#include "launch.cuh"

template struct effnet_fast::Passes<float>;
