/* Rows of weights -> blocks of 4- or 8-bit codes for com.microsoft.MatMulNBits, and back: tiles, packing, threads. The
 * arithmetic is in nbits_kernel.c. Layout: ONNX Runtime, docs/ContribOperators.md, MatMulNBits. */
#include "dispatch.h"
#include "half.h"
#include "nbits_kernel.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE_ELEMENTS = 32 * 1024, BLOCKS = ET_NBITS_BLOCKS, MAX_BLOCK = ET_NBITS_MAX_BLOCK };

static int64_t blocks_per_row(const struct et_nbits_format *format, int64_t k) {
    return (k - 1) / format->block_size + 1;
}

static int64_t weights_in_block(const struct et_nbits_format *format, int64_t k, int64_t block) {
    int64_t left = k - block * format->block_size;
    return left < format->block_size ? left : format->block_size;
}

static size_t zero_row_bytes(const struct et_nbits_format *format, int64_t k_blocks) {
    return (size_t)(k_blocks * format->bits + 7) / 8;
}

/* --- a tile ------------------------------------------------------------------------------------------------------- */

/* Memory of one thread: a tile, and full blocks padded with zeros in place of short or absent ones. */
struct work {
    struct et_nbits_tile tile;
    _Alignas(64) float filled[BLOCKS][MAX_BLOCK]; /* of the job's element type */
    uint8_t discarded[MAX_BLOCK];
};

/* Block `block` of row `row`; `index` counts the blocks of all rows. */
struct place {
    int64_t row, block, index;
};

static struct place next_block(struct place place, int64_t k_blocks) {
    bool ends = place.block + 1 == k_blocks;
    return (struct place){place.row + ends, ends ? 0 : place.block + 1, place.index + 1};
}

static void set_block(const struct et_nbits_quantize_job *job, struct work *work, int b, struct place place) {
    size_t width = et_dtype_bytes(job->dtype);
    int64_t size = job->format.block_size, begin = place.block * size;
    int64_t count = weights_in_block(&job->format, job->k, place.block);
    const char *values = (const char *)job->rows + (size_t)(place.row * job->k + begin) * width;
    if (count < size) {
        memset(work->filled[b], 0, (size_t)size * width);
        memcpy(work->filled[b], values, (size_t)count * width);
    }
    work->tile.from[b] = count < size ? (const void *)work->filled[b] : values;
    work->tile.to[b] = job->codes + place.index * (size * job->format.bits / 8);
    if (!job->weights)
        return;
    for (int64_t i = 0; i < size; i++)
        work->tile.w[i][b] = i < count ? job->weights[begin + i] : 0.0f;
}

static void set_nothing(struct work *work, int b) {
    memset(work->filled[b], 0, sizeof work->filled[b]);
    work->tile.from[b] = work->filled[b];
    work->tile.to[b] = work->discarded;
    for (int i = 0; i < MAX_BLOCK; i++)
        work->tile.w[i][b] = 0.0f;
}

/* Blocks of a row are stored in ascending order, so the one in the low half of a byte comes first. A last high half
 * without a block is 8. */
static void store_zero(uint8_t *row /* [zero_row_bytes] */, int64_t block, int bits, uint8_t zero) {
    if (bits == 8)
        row[block] = zero;
    else if (block % 2 == 0)
        row[block / 2] = (uint8_t)(zero | 8 << 4);
    else
        row[block / 2] = (uint8_t)((row[block / 2] & 15) | zero << 4);
}

/* False if the type of the scales cannot hold it. */
static bool store_scale(const struct et_nbits_quantize_job *job, float scale, float zero, struct place place) {
    const struct et_nbits_format *format = &job->format;
    if (format->half_scales)
        ((uint16_t *)job->scales)[place.index] = f16_of_float(scale);
    else
        ((float *)job->scales)[place.index] = scale;
    if (!format->symmetric) {
        size_t row_bytes = zero_row_bytes(format, blocks_per_row(format, job->k));
        store_zero(job->zero_points + (size_t)place.row * row_bytes, place.block, format->bits, (uint8_t)zero);
    }
    return fabsf(scale) <= FLT_MAX;
}

/* Quantizes `count` <= BLOCKS blocks from `*place` on, and moves it past them, or to the first block that fails. */
static enum et_status quantize_blocks(const struct et_nbits_quantize_job *job, struct work *work, int count,
                                      struct place *place) {
    const int64_t k_blocks = blocks_per_row(&job->format, job->k);
    struct place each = *place;
    for (int b = 0; b < count; b++, each = next_block(each, k_blocks))
        set_block(job, work, b, each);
    for (int b = count; b < BLOCKS; b++)
        set_nothing(work, b);
    et_kernels()->nbits->quantize(&work->tile, job->dtype, &job->format, job->weights != NULL, job->search);
    for (int b = 0; b < count; b++, *place = next_block(*place, k_blocks)) {
        if (work->tile.not_finite >> b & 1)
            return ET_NOT_FINITE;
        if (!store_scale(job, work->tile.scale[b], work->tile.zero[b], *place))
            return ET_SCALE_TOO_LARGE;
    }
    return ET_OK;
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

static enum et_status quantize_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_nbits_quantize_job *job = argument;
    struct work *work = aligned_alloc(64, sizeof *work);
    if (!work)
        return ET_NO_MEMORY;
    int64_t k_blocks = blocks_per_row(&job->format, job->k);
    struct place place = {begin, 0, begin * k_blocks};
    enum et_status status = ET_OK;
    while (place.row < end && status == ET_OK) {
        int64_t left = end * k_blocks - place.index;
        status = quantize_blocks(job, work, left < BLOCKS ? (int)left : BLOCKS, &place);
    }
    *bad_row = place.row;
    free(work);
    return status;
}

/* Only the proportions of the weights count. A power of two, which is exact, makes the largest less than 1, so that
 * sums do not overflow. */
static float *scaled_weights(const float *weights /* [k] */, int64_t k) {
    float *scaled = malloc((size_t)k * sizeof *scaled);
    float largest = 0.0f;
    for (int64_t i = 0; scaled && i < k; i++)
        largest = weights[i] > largest ? weights[i] : largest;
    int exponent = 0;
    frexpf(largest, &exponent);
    for (int64_t i = 0; scaled && i < k; i++)
        scaled[i] = ldexpf(weights[i], -exponent);
    return scaled;
}

struct et_outcome et_nbits_quantize(const struct et_nbits_quantize_job *job, int threads) {
    struct et_nbits_quantize_job scaled = *job;
    float *weights = NULL;
    if (job->weights && job->search && job->n > 0) {
        weights = scaled_weights(job->weights, job->k);
        if (!weights)
            return (struct et_outcome){ET_NO_MEMORY, 0};
    }
    scaled.weights = weights; /* used by the search only */
    struct et_outcome outcome =
        et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, quantize_rows, &scaled);
    free(weights);
    return outcome;
}

/* --- dequantization
 * --------------------------------------------------------------------------------------------------------- */

static float load_scale(const struct et_nbits_dequantize_job *job, int64_t index) {
    if (!job->format.half_scales)
        return ((const float *)job->scales)[index];
    return float_of_f16(((const uint16_t *)job->scales)[index]);
}

static float load_zero(const struct et_nbits_dequantize_job *job, int64_t row, int64_t block) {
    int bits = job->format.bits;
    if (job->format.symmetric)
        return (float)(1 << (bits - 1));
    const uint8_t *zeros =
        job->zero_points + (size_t)row * zero_row_bytes(&job->format, blocks_per_row(&job->format, job->k));
    return (float)(bits == 8 ? zeros[block] : (zeros[block / 2] >> 4 * (block % 2)) & 15);
}

static enum et_status dequantize_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_nbits_dequantize_job *job = argument;
    const struct et_nbits_format *format = &job->format;
    int64_t k_blocks = blocks_per_row(format, job->k), block_bytes = format->block_size * format->bits / 8;
    (void)bad_row;
    for (int64_t row = begin; row < end; row++)
        for (int64_t block = 0; block < k_blocks; block++)
            et_kernels()->nbits->dequantize(job->codes + (row * k_blocks + block) * block_bytes, format->bits,
                                            load_scale(job, row * k_blocks + block), load_zero(job, row, block),
                                            job->out + row * job->k + block * format->block_size,
                                            weights_in_block(format, job->k, block));
    return ET_OK;
}

struct et_outcome et_nbits_dequantize(const struct et_nbits_dequantize_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, dequantize_rows, job);
}
