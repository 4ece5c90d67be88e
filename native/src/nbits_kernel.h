/* Blocks of 4- and 8-bit codes: a tile of them, and the kernels that nbits_kernel.c implements for each instruction
 * set. */
#ifndef EDGETUNE_NBITS_KERNEL_H
#define EDGETUNE_NBITS_KERNEL_H

#include "edgetune.h"

/* Sixteen blocks at once, on every instruction set. */
enum { ET_NBITS_BLOCKS = 16, ET_NBITS_MAX_BLOCK = 256 };

struct et_nbits_tile {
    const void *from[ET_NBITS_BLOCKS]; /* each [block_size] of the job's element type */
    uint8_t *to[ET_NBITS_BLOCKS];      /* each [block_size * bits / 8]: the codes go here */
    uint32_t not_finite; /* found: bit b: block b has a NaN or an infinity, and its other results mean nothing */
    float scale[ET_NBITS_BLOCKS]; /* found: a value of the type of the scales */
    float zero[ET_NBITS_BLOCKS];  /* found: the zero point, an integer */
    /* If weighted: importance, less than 1; 0 where a block has no values. */
    _Alignas(64) float w[ET_NBITS_MAX_BLOCK][ET_NBITS_BLOCKS];
    /* For the kernels only: column b is block b; and the same in 16 bits, two values per word. */
    _Alignas(64) float x[ET_NBITS_MAX_BLOCK][ET_NBITS_BLOCKS];
    _Alignas(64) int32_t pairs[ET_NBITS_MAX_BLOCK / 2][ET_NBITS_BLOCKS];
};

struct et_nbits_kernels {
    void (*quantize)(struct et_nbits_tile *tile, enum et_dtype dtype, const struct et_nbits_format *format,
                     bool weighted, bool search);
    /* One block of count <= block_size weights: out[i] = scale * (code i - zero). */
    void (*dequantize)(const uint8_t *codes, int bits, float scale, float zero, float *out, int64_t count);
};

#endif
