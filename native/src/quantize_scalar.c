#include "simd_scalar.h"

#include "quantize_kernel.h"

const struct et_quantizers et_quantizers_scalar = ET_QUANTIZERS;
