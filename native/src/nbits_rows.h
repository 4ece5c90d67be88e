/* What nbits.c and the kernels of each instruction set (nbits_<isa>.c) share: a tile of blocks, and the table. */
#ifndef EDGETUNE_NBITS_ROWS_H
#define EDGETUNE_NBITS_ROWS_H

#include "edgetune.h"

/* Sixteen blocks at once, one per lane, on every instruction set. */
enum { ET_NBITS_LANES = 16, ET_NBITS_MAX_BLOCK = 256 };

struct et_nbits_tile {
    float x[ET_NBITS_MAX_BLOCK][ET_NBITS_LANES]; /* lane l holds block l; what a block lacks is 0 */
    float w[ET_NBITS_MAX_BLOCK][ET_NBITS_LANES]; /* importance, below 1; 0 where a block lacks values; if weighted */
    float scale[ET_NBITS_LANES];                 /* found: a number of the scale's type */
    float zero[ET_NBITS_LANES];                  /* found: the zero point, a whole number */
    uint8_t codes[ET_NBITS_MAX_BLOCK][ET_NBITS_LANES]; /* found: one code a byte, not yet packed */
};

struct et_nbits_kernels {
    /* Reads x and w, writes scale, zero and codes. */
    void (*quantize)(struct et_nbits_tile *tile, const struct et_nbits_format *format, bool weighted, bool search);
    /* One block of count <= block_size weights: out[i] = scale * (code i - zero). */
    void (*dequantize)(const uint8_t *codes, int bits, float scale, float zero, float *out, int64_t count);
};

extern const struct et_nbits_kernels et_nbits_scalar;
#ifdef __x86_64__
extern const struct et_nbits_kernels et_nbits_avx2;
extern const struct et_nbits_kernels et_nbits_avx512;
#endif

#endif
