/* The inner loops of the 4-bit and 8-bit formats of bitsandbytes, implemented for each instruction set by
 * bnb_kernel.c. */
#ifndef EDGETUNE_BNB_KERNEL_H
#define EDGETUNE_BNB_KERNEL_H

#include "edgetune.h"

struct et_bnb_kernels {
    /* source[count] of dtype (f16 or bf16) -> out[count] */
    void (*widen)(const uint16_t *source, enum et_dtype dtype, float *out, int64_t count);
    /* The largest |x|, as bits: from 0x7f800000 on one of them is not finite. */
    uint32_t (*absmax)(const float *x, int64_t count);
    /* x[count] * factor -> packed[(count + 1) / 2], the code of the even element in the high half of a byte */
    void (*encode)(const float *x, int64_t count, float factor, const struct et_four_bit *type, uint8_t *packed);
    /* packed[(count + 1) / 2] -> out[count] = table[code] */
    void (*expand)(const uint8_t *packed, int64_t count, const float *table /* [16] */, float *out);
    /* out[count] = code * scale / 127 in bitsandbytes' order, rounded to dtype */
    void (*scale_int8)(const int8_t *codes, int64_t count, float scale, enum et_dtype dtype, float *out);
};

/* The last block may be short. */
static inline int64_t block_length(int64_t count, int64_t blocksize, int64_t block) {
    int64_t left = count - block * blocksize;
    return left < blocksize ? left : blocksize;
}

#endif
