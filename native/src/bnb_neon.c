/* The block kernels with NEON's table lookup, which every AArch64 CPU has. */
#define EDGETUNE_NEON
#include "bnb_kernel.h"

const struct et_block_kernels et_blocks_neon = ET_BLOCK_KERNELS;
