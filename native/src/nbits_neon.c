/* Block quantization with NEON, which every AArch64 CPU has. */
#include "simd_neon.h"

#include "nbits_kernel.h"

const struct et_nbits_kernels et_nbits_neon = ET_NBITS_KERNELS;
