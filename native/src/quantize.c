/* Rows of weights -> GGUF blocks, from any element type, on several threads: with our own kernels, or with libggml. */
#include "dispatch.h"
#include "edgetune.h"
#include "half.h"
#include "quantize_kernel.h"

#include <stdlib.h>
#include <string.h>

enum {
    /* 128 KiB of f32: a converted tile stays in the second-level cache until it is quantized */
    TILE_ELEMENTS = 32 * 1024,
    PIECE_ELEMENTS = 16 * 1024, /* of one piece for our own kernels */
    SIGMA_ROWS = 8              /* rows whose squares are added side by side */
};

size_t et_dtype_bytes(enum et_dtype dtype) { return dtype == ET_F32 ? sizeof(float) : sizeof(uint16_t); }

static const float *floats_at(const struct et_quantize_job *job, int64_t element) {
    return (const float *)job->rows + element;
}

static const uint16_t *halves_at(const struct et_quantize_job *job, int64_t element) {
    return (const uint16_t *)job->rows + element;
}

/* --- libggml
 * ------------------------------------------------------------------------------------------------------- */

/* Quantizes f32 rows[count, k], which are rows begin .. of the job. If libggml fails, row by row finds the one that
 * fails. */
static enum et_status ggml_floats(const struct et_quantize_job *job, const float *rows, int64_t begin, int64_t count,
                                  int64_t *bad_row) {
    uint8_t *out = job->out + (size_t)begin * job->row_bytes;
    enum et_status status = et_ggml_quantize(job->type, rows, out, count, job->k, job->row_bytes, job->weights);
    *bad_row = begin;
    if (status != ET_GGML_REFUSED || count == 1)
        return status;
    for (int64_t i = 0; i < count; i++) {
        *bad_row = begin + i;
        status = et_ggml_quantize(job->type, rows + i * job->k, out, 1, job->k, job->row_bytes, job->weights);
        if (status != ET_OK)
            return status;
    }
    return ET_GGML_REFUSED;
}

static enum et_status ggml_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_quantize_job *job = argument;
    if (job->dtype == ET_F32)
        return ggml_floats(job, floats_at(job, begin * job->k), begin, end - begin, bad_row);
    int64_t count = (end - begin) * job->k;
    float *tile = malloc((size_t)count * sizeof *tile); /* [end - begin, k] */
    if (!tile)
        return ET_NO_MEMORY;
    et_widen(job->dtype, halves_at(job, begin * job->k), tile, count);
    enum et_status status = ggml_floats(job, tile, begin, end - begin, bad_row);
    free(tile);
    return status;
}

/* --- our own kernels
 * ------------------------------------------------------------------------------------------------- */

static const struct et_group_kernels *kernels_of(int type) {
    const struct et_quantize_kernels *table = et_kernels()->quantize;
    for (int i = 0; i < table->count; i++)
        if (table->types[i].type == type)
            return &table->types[i];
    return NULL;
}

/* The data of one thread. */
struct work {
    const struct et_quantize_job *job;
    const struct et_group_kernels *kernels;
    int64_t row_blocks;  /* blocks of a row */
    const float *sigma2; /* of rows from sigma_row on; NULL where it is not needed */
    int64_t sigma_row;
    uint8_t discarded[ET_MAX_BLOCK_BYTES];
};

static void start_work(struct work *work, const struct et_quantize_job *job) {
    work->job = job;
    work->kernels = kernels_of(job->type);
    work->row_blocks = job->k / work->kernels->block_size;
    work->sigma2 = NULL;
    work->sigma_row = 0;
}

/* Sets a group to `count` blocks from `first` on, counted over all rows of the job. */
static void gather(struct work *work, int64_t first, int count, struct et_group *group) {
    const struct et_quantize_job *job = work->job;
    const int64_t size = work->kernels->block_size;
    group->dtype = job->dtype;
    for (int b = 0; b < work->kernels->group; b++) {
        int64_t block = first + (b < count ? b : count - 1), row = block / work->row_blocks;
        group->x[b] = (const char *)job->rows + (size_t)(block * size) * et_dtype_bytes(job->dtype);
        group->w[b] = job->weights ? job->weights + block % work->row_blocks * size : NULL;
        group->sigma2[b] = work->sigma2 ? work->sigma2[row - work->sigma_row] : 0;
        group->out[b] = b < count ? job->out + block * work->kernels->block_bytes : work->discarded;
    }
}

/* Handles block b of a group, for which the kernel could not prove its result. */
typedef enum et_status (*redo_fn)(const struct work *work, const struct et_group *group, int b, int64_t row,
                                  void *redo);

static enum et_status quantize_blocks(struct work *work, int64_t begin, int64_t end, redo_fn redo, void *redo_data,
                                      int64_t *bad_row) {
    et_group_fn quantize = work->job->weights ? work->kernels->weighted : work->kernels->plain;
    const int64_t whole = work->kernels->group;
    for (int64_t first = begin; first < end; first += whole) {
        struct et_group group;
        int count = (int)(end - first < whole ? end - first : whole);
        gather(work, first, count, &group);
        uint64_t left = quantize(&group);
        for (int b = 0; b < count && left >> b; b++) {
            *bad_row = (first + b) / work->row_blocks;
            enum et_status status = left >> b & 1 ? redo(work, &group, b, *bad_row, redo_data) : ET_OK;
            if (status != ET_OK)
                return status;
        }
    }
    return ET_OK;
}

/* --- blocks that do not depend on their row
 * ----------------------------------------------------------------------------- */

/* Quantizes the block with libggml. */
static enum et_status redo_block(const struct work *work, const struct et_group *group, int b, int64_t row,
                                 void *data) {
    const struct et_quantize_job *job = work->job;
    float converted[ET_MAX_BLOCK];
    const float *x = group->x[b];
    (void)row, (void)data;
    if (job->dtype != ET_F32) {
        et_widen(job->dtype, group->x[b], converted, work->kernels->block_size);
        x = converted;
    }
    return et_ggml_quantize(job->type, x, group->out[b], 1, work->kernels->block_size,
                            (size_t)work->kernels->block_bytes, group->w[b]);
}

static enum et_status block_range(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    struct work work;
    start_work(&work, argument);
    return quantize_blocks(&work, begin, end, redo_block, NULL, bad_row);
}

/* --- blocks whose weights depend on the mean square of the row
 * --------------------------------------------------------- */

/* Mean squares of rows begin .. begin + count - 1: added from left to right as in libggml, rows side by side. */
static void find_sigma2(const struct et_quantize_job *job, int64_t begin, int64_t count, float *sigma2) {
    float sum[SIGMA_ROWS] = {0}, part[SIGMA_ROWS][64];
    for (int64_t i = 0; i < job->k; i += 64) {
        int64_t width = job->k - i < 64 ? job->k - i : 64;
        for (int64_t r = 0; r < SIGMA_ROWS; r++) {
            int64_t element = (begin + (r < count ? r : 0)) * job->k + i;
            if (job->dtype == ET_F32)
                memcpy(part[r], floats_at(job, element), (size_t)width * sizeof(float));
            else
                et_widen(job->dtype, halves_at(job, element), part[r], width);
        }
        for (int64_t j = 0; j < width; j++)
            for (int r = 0; r < SIGMA_ROWS; r++)
                sum[r] += part[r][j] * part[r][j];
    }
    for (int r = 0; r < SIGMA_ROWS; r++)
        sigma2[r] = sum[r] / (float)job->k;
}

static enum et_status mark_row(const struct work *work, const struct et_group *group, int b, int64_t row,
                               void *marked) {
    (void)group, (void)b;
    ((bool *)marked)[row - work->sigma_row] = true;
    return ET_OK;
}

/* Quantizes at most SIGMA_ROWS rows; libggml quantizes a row that has an unproven block. */
static enum et_status row_range(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    struct work work;
    float sigma2[SIGMA_ROWS];
    bool marked[SIGMA_ROWS] = {false};
    start_work(&work, argument);
    find_sigma2(work.job, begin, end - begin, sigma2);
    work.sigma2 = sigma2;
    work.sigma_row = begin;
    enum et_status status =
        quantize_blocks(&work, begin * work.row_blocks, end * work.row_blocks, mark_row, marked, bad_row);
    for (int64_t row = begin; row < end && status == ET_OK; row++)
        if (marked[row - begin])
            status = ggml_rows(work.job, row, row + 1, bad_row);
    return status;
}

struct et_outcome et_quantize(const struct et_quantize_job *job, int threads) {
    const struct et_group_kernels *kernels = kernels_of(job->type);
    if (!kernels) {
        et_ggml_prepare(job->type);
        return et_parallel_rows(job->n, et_grain(job->k, TILE_ELEMENTS), threads, ggml_rows, job);
    }
    if (kernels->row_sigma2 && job->weights)
        return et_parallel_rows(job->n, SIGMA_ROWS, threads, row_range, job);
    int64_t groups = et_grain((int64_t)kernels->group * kernels->block_size, PIECE_ELEMENTS);
    return et_parallel_rows(job->n * (job->k / kernels->block_size), groups * kernels->group, threads, block_range,
                            job);
}
