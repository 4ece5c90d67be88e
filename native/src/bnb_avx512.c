/* The block kernels compiled for AVX-512 F, BW, DQ, VL (flags set in CMakeLists.txt). */
#include "bnb_kernel.h"

const struct et_block_kernels et_blocks_avx512 = ET_BLOCK_KERNELS;
