/* Block quantization compiled for AVX2 (-mavx2, set in CMakeLists.txt). */
#include "simd_avx2.h"

#include "nbits_kernel.h"

const struct et_nbits_kernels et_nbits_avx2 = ET_NBITS_KERNELS;
