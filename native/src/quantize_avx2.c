#include "simd_avx2.h"

#include "quantize_kernel.h"

const struct et_quantizers et_quantizers_avx2 = ET_QUANTIZERS;
