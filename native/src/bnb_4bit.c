/* NF4 and FP4: rows of weights -> packed codes -> weights, and both at once.
 *
 * A block is scaled by its absmax to -1..1. Each weight becomes the code of the nearest of 16 values; the even element
 * of a pair is in the high half of a byte. To dequantize, value * absmax is rounded to the dtype: 16 products per
 * block.
 */
#include "bnb_kernel.h"
#include "dispatch.h"
#include "half.h"

enum { PIECE_ELEMENTS = 64 * 1024 };

/* Codes of equal value (the two zeros of FP4) keep their order. */
void et_four_bit_of(const float *values, struct et_four_bit *type) {
    memcpy(type->values, values, sizeof type->values);
    for (int code = 0; code < 16; code++) {
        int rank = code;
        for (; rank > 0 && values[type->codes[rank - 1]] > values[code]; rank--)
            type->codes[rank] = type->codes[rank - 1];
        type->codes[rank] = (uint8_t)code;
    }
    memset(type->bounds, 0, sizeof type->bounds);
    type->ascending = true;
    for (int rank = 0; rank < 16; rank++)
        type->ascending = type->ascending && type->codes[rank] == rank;
    for (int rank = 0; rank < 15; rank++)
        type->bounds[rank] = (values[type->codes[rank]] + values[type->codes[rank + 1]]) / 2.0f;
}

/* A full block is multiplied by 1/absmax, a shorter last block is divided by absmax: the roundings differ. */
static void encode_block(const struct et_quantize_4bit_job *job, int64_t block, uint8_t *packed) {
    const struct et_bnb_kernels *kernels = et_kernels()->bnb;
    int64_t first = block * job->blocksize, length = block_length(job->count, job->blocksize, block);
    float tile[ET_LARGEST_BLOCK], absmax = job->absmax[block];
    const float *x = tile;
    if (job->dtype != ET_F32)
        kernels->widen((const uint16_t *)job->rows + first, job->dtype, tile, length);
    else
        x = (const float *)job->rows + first;
    if (length == job->blocksize) {
        kernels->encode(x, length, 1.0f / (absmax > 1e-38f ? absmax : 1e-38f), job->type, packed);
        return;
    }
    for (int64_t i = 0; i < length; i++)
        tile[i] = x[i] / absmax;
    kernels->encode(tile, length, 1.0f, job->type, packed);
}

static void decode_block(const struct et_dequantize_4bit_job *job, int64_t block, const uint8_t *packed) {
    float table[16], absmax = job->absmax[block];
    for (int code = 0; code < 16; code++)
        table[code] = round_to(job->dtype, job->type->values[code] * absmax);
    et_kernels()->bnb->expand(packed, block_length(job->count, job->blocksize, block), table,
                              job->out + block * job->blocksize);
}

static enum et_status quantize_blocks(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_quantize_4bit_job *job = argument;
    (void)bad_row;
    for (int64_t block = begin; block < end; block++)
        encode_block(job, block, job->packed + block * (job->blocksize / 2));
    return ET_OK;
}

static enum et_status dequantize_blocks(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_dequantize_4bit_job *job = argument;
    (void)bad_row;
    for (int64_t block = begin; block < end; block++)
        decode_block(job, block, job->packed + block * (job->blocksize / 2));
    return ET_OK;
}

static enum et_status roundtrip_blocks(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_roundtrip_4bit_job *job = argument;
    uint8_t packed[ET_LARGEST_BLOCK / 2];
    (void)bad_row;
    for (int64_t block = begin; block < end; block++) {
        encode_block(&job->from, block, packed);
        decode_block(&job->to, block, packed);
    }
    return ET_OK;
}

static struct et_outcome over_blocks(int64_t count, int64_t blocksize, int threads, et_rows_fn fn, const void *job) {
    return et_parallel_rows(et_blocks(count, blocksize), et_grain(blocksize, PIECE_ELEMENTS), threads, fn, job);
}

struct et_outcome et_quantize_4bit(const struct et_quantize_4bit_job *job, int threads) {
    return over_blocks(job->count, job->blocksize, threads, quantize_blocks, job);
}

struct et_outcome et_dequantize_4bit(const struct et_dequantize_4bit_job *job, int threads) {
    return over_blocks(job->count, job->blocksize, threads, dequantize_blocks, job);
}

struct et_outcome et_roundtrip_4bit(const struct et_roundtrip_4bit_job *job, int threads) {
    return over_blocks(job->from.count, job->from.blocksize, threads, roundtrip_blocks, job);
}
