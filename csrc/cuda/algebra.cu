#include "algebra.cuh"
