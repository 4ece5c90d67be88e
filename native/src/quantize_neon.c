#include "simd_neon.h"

#include "quantize_kernel.h"

const struct et_quantizers et_quantizers_neon = ET_QUANTIZERS;
