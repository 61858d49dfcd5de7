#include "passes.h"

EFFNET_FAST_MODULE(_cpu_amx)
