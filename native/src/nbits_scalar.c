/* Block quantization compiled for the baseline of the target (SSE2 on x86-64, NEON on AArch64). */
#include "simd_scalar.h"

#include "nbits_kernel.h"

const struct et_nbits_kernels et_nbits_scalar = ET_NBITS_KERNELS;
