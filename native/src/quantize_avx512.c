#include "simd_avx512.h"

#include "quantize_kernel.h"

const struct et_quantizers et_quantizers_avx512 = ET_QUANTIZERS;
