#include "launch.cuh"

template struct effnet_fast::Passes<__half>;
