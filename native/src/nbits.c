/* Rows of weights -> blocks of 4- or 8-bit codes for com.microsoft.MatMulNBits, and back. Here: tiles, packing,
 * threads; the arithmetic is in nbits_kernel.h. Layout: ONNX Runtime, docs/ContribOperators.md, MatMulNBits. */
#include "nbits_rows.h"
#include "half.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { PIECE_ELEMENTS = 32 * 1024, LANES = ET_NBITS_LANES, MAX_BLOCK = ET_NBITS_MAX_BLOCK };

static const struct et_nbits_kernels *nbits_kernels(void) {
#ifdef __x86_64__
    if (et_isa_in_use == ET_AVX512)
        return &et_nbits_avx512;
    if (et_isa_in_use == ET_AVX2)
        return &et_nbits_avx2;
#endif
    return &et_nbits_scalar;
}

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

/* A block as floats: where it lies, or widened into `buffer`. */
static const float *block_floats(const struct et_nbits_quantize_job *job, int64_t offset, int64_t count,
                                 float *buffer /* [count] */) {
    if (job->dtype == ET_F32)
        return (const float *)job->rows + offset;
    et_widen(job->dtype, (const uint16_t *)job->rows + offset, buffer, count);
    return buffer;
}

static bool all_finite(const float *x /* [count] */, int64_t count) {
    int32_t wrong = 0;
    for (int64_t i = 0; i < count; i++)
        wrong |= !(fabsf(x[i]) <= FLT_MAX);
    return !wrong;
}

static void fill_lane(float lanes[][LANES], int lane, const float *values /* [count] */, int64_t count, int size) {
    for (int64_t i = 0; i < count; i++)
        lanes[i][lane] = values[i];
    for (int64_t i = count; i < size; i++)
        lanes[i][lane] = 0.0f;
}

/* Lane `lane` = block `block` of row `row`; false if that holds a value that is not finite. */
static bool load_block(const struct et_nbits_quantize_job *job, struct et_nbits_tile *tile, int lane, int64_t row,
                       int64_t block) {
    float buffer[MAX_BLOCK];
    int size = job->format.block_size;
    int64_t begin = block * size, count = weights_in_block(&job->format, job->k, block);
    const float *values = block_floats(job, row * job->k + begin, count, buffer);
    fill_lane(tile->x, lane, values, count, size);
    if (job->weights)
        fill_lane(tile->w, lane, job->weights + begin, count, size);
    return all_finite(values, count);
}

static void store_codes(const struct et_nbits_tile *tile, int lane, const struct et_nbits_format *format,
                        uint8_t *out) {
    if (format->bits == 8)
        for (int i = 0; i < format->block_size; i++)
            out[i] = tile->codes[i][lane];
    else
        for (int i = 0; i < format->block_size; i += 2)
            out[i / 2] = (uint8_t)(tile->codes[i][lane] | tile->codes[i + 1][lane] << 4);
}

/* Blocks of a row are stored in ascending order, so the one in the low half comes first; a last high half without a
 * block holds the middle. */
static void store_zero(uint8_t *row /* [zero_row_bytes] */, int64_t block, int bits, uint8_t zero) {
    if (bits == 8)
        row[block] = zero;
    else if (block % 2 == 0)
        row[block / 2] = (uint8_t)(zero | 8 << 4);
    else
        row[block / 2] = (uint8_t)((row[block / 2] & 15) | zero << 4);
}

/* False if the scale does not fit its type. */
static bool store_block(const struct et_nbits_quantize_job *job, const struct et_nbits_tile *tile, int lane,
                        int64_t row, int64_t block) {
    const struct et_nbits_format *format = &job->format;
    int64_t k_blocks = blocks_per_row(format, job->k), index = row * k_blocks + block;
    float scale = tile->scale[lane];
    if (format->half_scales)
        ((uint16_t *)job->scales)[index] = f16_of_float(scale);
    else
        ((float *)job->scales)[index] = scale;
    store_codes(tile, lane, format, job->codes + index * (format->block_size * format->bits / 8));
    if (!format->symmetric)
        store_zero(job->zero_points + (size_t)row * zero_row_bytes(format, k_blocks), block, format->bits,
                   (uint8_t)tile->zero[lane]);
    return fabsf(scale) <= FLT_MAX;
}

/* `count` <= LANES blocks of the rows as one sequence, from block `first` on; the lanes without one are zeros. */
static enum et_status quantize_lanes(const struct et_nbits_quantize_job *job, struct et_nbits_tile *tile, int64_t first,
                                     int count, int64_t *bad_row) {
    int64_t k_blocks = blocks_per_row(&job->format, job->k);
    int good = 0; /* blocks before the first that is not finite: the row of an earlier failure goes first */
    while (good < count && load_block(job, tile, good, (first + good) / k_blocks, (first + good) % k_blocks))
        good++;
    for (int lane = good; lane < LANES; lane++) {
        fill_lane(tile->x, lane, NULL, 0, job->format.block_size);
        if (job->weights)
            fill_lane(tile->w, lane, NULL, 0, job->format.block_size);
    }
    nbits_kernels()->quantize(tile, &job->format, job->weights != NULL, job->search);
    for (int lane = 0; lane < good; lane++) {
        *bad_row = (first + lane) / k_blocks;
        if (!store_block(job, tile, lane, *bad_row, (first + lane) % k_blocks))
            return ET_SCALE_TOO_LARGE;
    }
    *bad_row = (first + good) / k_blocks;
    return good < count ? ET_NOT_FINITE : ET_OK;
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

static enum et_status quantize_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_nbits_quantize_job *job = argument;
    struct et_nbits_tile *tile = aligned_alloc(64, sizeof *tile); /* the size of each part is a multiple of 64 */
    if (!tile)
        return ET_NO_MEMORY;
    int64_t k_blocks = blocks_per_row(&job->format, job->k);
    enum et_status status = ET_OK;
    for (int64_t first = begin * k_blocks; first < end * k_blocks && status == ET_OK; first += LANES) {
        int64_t left = end * k_blocks - first;
        status = quantize_lanes(job, tile, first, left < LANES ? (int)left : LANES, bad_row);
    }
    free(tile);
    return status;
}

/* Only the proportions of the weights matter: times a power of two, which is exact, so that the largest is below 1 and
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
    scaled.weights = weights; /* without a search nothing asks for them */
    struct et_outcome outcome =
        et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, quantize_rows, &scaled);
    free(weights);
    return outcome;
}

/* --- back --------------------------------------------------------------------------------------------------------- */

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
            nbits_kernels()->dequantize(job->codes + (row * k_blocks + block) * block_bytes, format->bits,
                                        load_scale(job, row * k_blocks + block), load_zero(job, row, block),
                                        job->out + row * job->k + block * format->block_size,
                                        weights_in_block(format, job->k, block));
    return ET_OK;
}

struct et_outcome et_nbits_dequantize(const struct et_nbits_dequantize_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, dequantize_rows, job);
}
