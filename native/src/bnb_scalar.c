/* The block kernels compiled for the baseline of the target (SSE2 on x86-64, NEON on AArch64). */
#include "bnb_kernel.h"

const struct et_block_kernels et_blocks_scalar = ET_BLOCK_KERNELS;
