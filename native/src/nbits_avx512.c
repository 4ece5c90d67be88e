/* Block quantization compiled for AVX-512 F, BW, DQ, VL (flags set in CMakeLists.txt). */
#include "simd_avx512.h"

#include "nbits_kernel.h"

const struct et_nbits_kernels et_nbits_avx512 = ET_NBITS_KERNELS;
