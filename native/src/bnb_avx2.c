/* The block kernels compiled for AVX2 (-mavx2, set in CMakeLists.txt). */
#include "bnb_kernel.h"

const struct et_block_kernels et_blocks_avx2 = ET_BLOCK_KERNELS;
