/* The scales of bitsandbytes' 4-bit blocks: the largest |weight| of each, their mean, and their 8-bit codes. */
#include "bnb_kernel.h"
#include "dispatch.h"
#include "half.h"

#include <math.h>

enum { PIECE_ELEMENTS = 64 * 1024 };

/* --- the largest of each block ------------------------------------------------------------------------------------ */

static int64_t first_not_finite(const float *x /* [count] */, int64_t count) {
    int64_t i = 0;
    while (i < count - 1 && isfinite(x[i]))
        i++;
    return i;
}

static enum et_status absmax_blocks(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_absmax_job *job = argument;
    const struct et_bnb_kernels *kernels = et_kernels()->bnb;
    float tile[ET_LARGEST_BLOCK];
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * job->blocksize, length = block_length(job->count, job->blocksize, block);
        const float *x = tile;
        if (job->dtype == ET_F32)
            x = (const float *)job->rows + first;
        else
            kernels->widen((const uint16_t *)job->rows + first, job->dtype, tile, length);
        uint32_t bits = kernels->absmax(x, length);
        if (bits >= 0x7f800000) {
            *bad_row = (first + first_not_finite(x, length)) / job->k;
            return ET_NOT_FINITE;
        }
        float largest = float_of_bits(bits);
        job->absmax[block] = length < job->blocksize && largest < 1e-38f ? 1e-38f : largest;
    }
    return ET_OK;
}

struct et_outcome et_absmax(const struct et_absmax_job *job, int threads) {
    int64_t blocks = et_blocks(job->count, job->blocksize);
    return et_parallel_rows(blocks, et_grain(job->blocksize, PIECE_ELEMENTS), threads, absmax_blocks, job);
}

/* --- PyTorch's mean ----------------------------------------------------------------------------------------------- */

/* PyTorch adds in 8 lanes (on every x86-64), four such vectors per step, and the steps through a cascade: after 2^power
 * steps a partial sum moves up one level, so that numbers of similar size are added. From GRAIN numbers on, each thread
 * sums a contiguous part, and the parts are added. All of it is f32; the order determines the bits.
 */
enum { LANES = 8, VECTORS = 4, LEVELS = 4, WIDTH = LANES * VECTORS, GRAIN = 32768, MOST_THREADS = 4096 };

static void add_to(float *sum, const float *x, int64_t width) {
    for (int64_t i = 0; i < width; i++)
        sum[i] += x[i];
}

static int ceil_log2(int64_t value) {
    int power = 0;
    while (power < 62 && ((int64_t)1 << power) < value)
        power++;
    return power;
}

/* Adds the sums of level 0 to the level above, and so on while a level is full; `step` steps are done. */
static void carry(float level[LEVELS][WIDTH], int64_t width, int64_t step, int power) {
    int64_t mask = ((int64_t)1 << power) - 1;
    for (int l = 1; l < LEVELS; l++) {
        add_to(level[l], level[l - 1], width);
        memset(level[l - 1], 0, sizeof level[l - 1]);
        if (step & (mask << (l * power)))
            return;
    }
}

/* x[steps, width] -> sum[width] */
static void cascade(const float *x, int64_t steps, int64_t width, float *sum) {
    float level[LEVELS][WIDTH];
    memset(level, 0, sizeof level);
    int power = ceil_log2(steps) / LEVELS;
    power = power < 4 ? 4 : power;
    int64_t step = 0, each = (int64_t)1 << power;
    while (step + each <= steps) {
        for (int64_t end = step + each; step < end; step++)
            add_to(level[0], x + step * width, width);
        carry(level, width, step, power);
    }
    for (; step < steps; step++)
        add_to(level[0], x + step * width, width);
    for (int l = 1; l < LEVELS; l++)
        add_to(level[0], level[l], width);
    memcpy(sum, level[0], (size_t)width * sizeof *sum);
}

/* Sums vectors of `lanes` numbers -> sum[0..lanes-1], which has room for WIDTH. */
static void sum_vectors(const float *x, int64_t vectors, int64_t lanes, float *sum) {
    int64_t steps = vectors / VECTORS;
    cascade(x, steps, lanes * VECTORS, sum);
    for (int64_t v = steps * VECTORS; v < vectors; v++)
        add_to(sum, x + v * lanes, lanes);
    for (int64_t v = 1; v < VECTORS; v++)
        add_to(sum, sum + v * lanes, lanes);
}

static float serial_sum(const float *x /* [count] */, int64_t count) {
    float sum[WIDTH], total = 0.0f;
    if (count < LANES) {
        sum_vectors(x, count, 1, sum);
        return sum[0];
    }
    sum_vectors(x, count / LANES, LANES, sum);
    for (int64_t i = count / LANES * LANES; i < count; i++)
        total += x[i];
    for (int l = 0; l < LANES; l++)
        total += sum[l];
    return total;
}

float et_torch_mean(const float *values, int64_t count, int threads) {
    if (threads == 1 || count < GRAIN)
        return serial_sum(values, count) / (float)count;
    float part[MOST_THREADS] = {0};
    int64_t slots = threads < MOST_THREADS ? threads : MOST_THREADS;
    int64_t used = et_blocks(count, GRAIN) < slots ? et_blocks(count, GRAIN) : slots;
    int64_t each = et_blocks(count, used);
    for (int64_t t = 0; t < used && t * each < count; t++)
        part[t] = serial_sum(values + t * each, block_length(count, each, t));
    return serial_sum(part, slots) / (float)count;
}

/* --- the scales in 8 bits ----------------------------------------------------------------------------------------- */

/* bitsandbytes divides -1..1 into ET_NEAREST_SIZE - 1 steps and looks up the code of the nearest step. Its compiler
 * fuses the product and the sum. In double both are exact, so rounding once to f32 gives the same step without that
 * instruction. */
static uint8_t nearest_code(const uint8_t *nearest, float value) {
    value = value > -1.0f ? value : -1.0f;
    value = value < 1.0f ? value : 1.0f;
    float half = (value + 1.0f) * 0.5f;
    return nearest[(int32_t)(float)((double)half * (ET_NEAREST_SIZE - 1) + 0.5)];
}

static enum et_status nest_blocks(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_nest_job *job = argument;
    (void)bad_row;
    for (int64_t block = begin; block < end; block++) {
        const float *x = job->absmax + block * job->blocksize;
        uint8_t *codes = job->codes + block * job->blocksize;
        int64_t length = block_length(job->count, job->blocksize, block);
        float largest = 0.0f;
        for (int64_t i = 0; i < length; i++) {
            float size = fabsf(x[i] - job->offset);
            largest = size > largest ? size : largest;
        }
        job->nested_absmax[block] = largest;
        float factor = 1.0f / largest;
        for (int64_t i = 0; i < length; i++)
            codes[i] = largest > 0.0f ? nearest_code(job->nearest, (x[i] - job->offset) * factor) : 0;
    }
    return ET_OK;
}

static enum et_status unnest_blocks(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_unnest_job *job = argument;
    (void)bad_row;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * job->blocksize, length = block_length(job->count, job->blocksize, block);
        for (int64_t i = first; i < first + length; i++)
            job->absmax[i] = job->map[job->codes[i]] * job->nested_absmax[block] + job->offset;
    }
    return ET_OK;
}

struct et_outcome et_nest(const struct et_nest_job *job, int threads) {
    int64_t blocks = et_blocks(job->count, job->blocksize);
    return et_parallel_rows(blocks, et_grain(job->blocksize, PIECE_ELEMENTS), threads, nest_blocks, job);
}

struct et_outcome et_unnest(const struct et_unnest_job *job, int threads) {
    int64_t blocks = et_blocks(job->count, job->blocksize);
    return et_parallel_rows(blocks, et_grain(job->blocksize, PIECE_ELEMENTS), threads, unnest_blocks, job);
}
