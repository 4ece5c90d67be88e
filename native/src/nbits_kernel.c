/* Block quantization to 4 and 8 bits, sixteen blocks at a time, compiled once for each instruction set (see
 * dispatch.h). The parts that take most of the time use vectors (nbits_lanes.h, nbits_search.h). The others are short
 * loops over the blocks without branches, which the compiler vectorizes. Each block sees the same operations in the
 * same order everywhere (and nothing is contracted), so the bytes are the same on every instruction set.
 *
 * The search in this file is for 8 bits, and for columns with importance weights.
 * A code q stands for scale * (q - zero). With d = q - zero, t = x / scale and r = t - d the error of a block is
 * scale^2 sum w r^2. For given d, the scale with the least error is scale * (1 + delta), delta = sum w r d / sum w d^2,
 * and a scale that is off by delta has the error scale^2 (sum w r^2 - 2 delta sum w r d + delta^2 sum w d^2). The
 * remainders r in place of x make single precision sufficient: nothing large cancels, not even at 8 bits.
 */
#include "nbits_kernel.h"

#include "dispatch.h"
#include "half.h"
#include "nbits_lanes.h"
#include "nbits_search.h"

#include <float.h>
#include <math.h>
#include <string.h>

INLINE float smaller(float a, float b) { return a < b ? a : b; }

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE float clamp(float x, float low, float high) { return smaller(larger(x, low), high); }

/* Half away from zero, as roundf, for 0 <= x < 2^22. The difference is exact, so ties are detected. */
INLINE float round_half_up(float x) {
    float even = (x + ROUNDING) - ROUNDING;
    return x - even == 0.5f ? even + 1.0f : even;
}

/* Scales as they will be stored, and 0 below the smallest normal number, where the reciprocal could overflow. (Here and
 * below, conditions that are the same for all lanes stand outside the loop, so that the compiler can vectorize it.) */
INLINE void store_scales(const float *scale, bool half, float *stored) {
    memcpy(stored, scale, BLOCKS * sizeof *stored);
    if (half)
        for (int l = 0; l < BLOCKS; l++)
            stored[l] = round_f16(stored[l]);
    for (int l = 0; l < BLOCKS; l++)
        stored[l] = fabsf(stored[l]) >= FLT_MIN ? stored[l] : 0.0f;
}

/* --- the rule without search -------------------------------------------------------------------------------------- */

/* The numbers of a format. */
struct range {
    float top;    /* the largest code: 15 or 255 */
    float middle; /* the zero point of symmetric blocks: 8 or 128 */
    bool symmetric, half;
};

/* The blocks before the search. */
struct start {
    float low[BLOCKS], high[BLOCKS]; /* the smallest and largest value, 0 included */
    float exact[BLOCKS];             /* the scale that covers them, before rounding */
    float scale[BLOCKS], zero[BLOCKS];
};

/* The rule of ONNX Runtime's quantizer. Symmetric: the value of largest size (of equal ones the negative one) gets code
 * 0, so the scale has the opposite sign. Otherwise: the range from min(x, 0) to max(x, 0) is spread over all codes. The
 * range is halved first, which changes no bit and does not overflow. */
INLINE void cover_range(struct range range, struct start *start) {
    const float *low = start->low, *high = start->high;
    float *exact = start->exact, *zero = start->zero;
    if (range.symmetric)
        for (int l = 0; l < BLOCKS; l++)
            exact[l] = (high[l] > -low[l] ? high[l] : low[l]) / -range.middle;
    else
        for (int l = 0; l < BLOCKS; l++)
            exact[l] = (high[l] * 0.5f - low[l] * 0.5f) / range.top * 2.0f;
    store_scales(exact, false, exact);
    store_scales(exact, range.half, start->scale);
    for (int l = 0; l < BLOCKS; l++) {
        float divisor = exact[l] != 0.0f ? exact[l] : 1.0f;
        zero[l] = round_half_up(clamp(0.0f - low[l] / divisor, 0.0f, range.top));
    }
    if (range.symmetric)
        for (int l = 0; l < BLOCKS; l++)
            zero[l] = range.middle;
}

/* The inverse of the scale that covers the range; 0 where there is no search: errors are then not numbers. */
INLINE void units(const struct start *start, float *unit) {
    for (int l = 0; l < BLOCKS; l++)
        unit[l] = start->scale[l] != 0.0f ? 1.0f / start->exact[l] : 0.0f;
}

INLINE float code_of(float x, float inverse, float zero, float top) {
    return round_half_up(clamp(x * inverse + zero, 0.0f, top));
}

INLINE void inverses(const float *scale, float *inverse) {
    for (int l = 0; l < BLOCKS; l++)
        inverse[l] = scale[l] != 0.0f ? 1.0f / scale[l] : 0.0f;
}

/* --- the search --------------------------------------------------------------------------------------------------- */

/* The grid of scales to try first: scale i is the one that covers the range, times top / (top + first + i * step)
 * (symmetric: middle for top). Above 0, the block is clipped. Below 0, it gains only where its values happen to be near
 * the steps, which is most of the gain at 8 bits. Counts and bounds are measured: with 400 scales the error falls by
 * another 0.8 % at 4 bits, most of it with twice as many, and by 1 to 2 % at 8 bits (blocks of 32, no importance). */
struct grid {
    int count;
    float first, step;
};

static const struct grid GRID_4_SYMMETRIC = {8, -1.25f, 0.8125f};
static const struct grid GRID_4 = {9, -1.25f, 0.6875f};
static const struct grid GRID_8_SYMMETRIC = {32, -20.0f, 0.71875f};
static const struct grid GRID_8 = {32, -40.0f, 1.34375f};

/* Then, from the best so far: other zero points, or the other sign, each with the best scale for its codes. */
enum { MOVES = 4 };
static const float MOVE_ZERO[MOVES] = {-1.0f, 1.0f, 0.0f, 0.0f};
static const float MOVE_SIGN[MOVES] = {-1.0f, 1.0f, 1.0f, 1.0f};

struct sums { /* over a block, each [BLOCKS]: of w r^2, w r d and w d^2 */
    float rr[BLOCKS], rd[BLOCKS], dd[BLOCKS];
};

INLINE void add_up(const struct et_nbits_tile *tile, int size, bool weighted, float top, const float *inverse,
                   const float *zero, struct sums *sums) {
    float rr[BLOCKS] = {0}, rd[BLOCKS] = {0}, dd[BLOCKS] = {0}, low[BLOCKS], high[BLOCKS];
    for (int l = 0; l < BLOCKS; l++) {
        low[l] = -zero[l];
        high[l] = top - zero[l];
    }
    for (int i = 0; i < size; i++)
        for (int l = 0; l < BLOCKS; l++) {
            float t = tile->x[i][l] * inverse[l];
            float d = (clamp(t, low[l], high[l]) + ROUNDING) - ROUNDING;
            float r = t - d;
            float wr = weighted ? tile->w[i][l] * r : r;
            float wd = weighted ? tile->w[i][l] * d : d;
            rr[l] += wr * r;
            rd[l] += wr * d;
            dd[l] += wd * d;
        }
    memcpy(sums->rr, rr, sizeof rr);
    memcpy(sums->rd, rd, sizeof rd);
    memcpy(sums->dd, dd, sizeof dd);
}

/* The best so far, each [BLOCKS]. Errors are relative to the square of start->exact, so that they neither overflow nor
 * vanish for values of any size. */
struct best {
    float error[BLOCKS], scale[BLOCKS], zero[BLOCKS];
};

/* The best scale for the codes of the scale 1 / inverse: 1 / inverse * (1 + delta). */
INLINE void fit(const struct sums *sums, bool half, const float *inverse, float *scale, float *delta) {
    for (int l = 0; l < BLOCKS; l++) {
        float divisor = sums->dd[l] > 0.0f ? sums->dd[l] : 1.0f;
        delta[l] = sums->rd[l] / divisor; /* if all d are 0, so is rd */
        float tried = 1.0f / inverse[l];
        scale[l] = tried + tried * delta[l];
    }
    if (half)
        for (int l = 0; l < BLOCKS; l++) {
            scale[l] = round_f16(scale[l]);
            delta[l] = scale[l] * inverse[l] - 1.0f;
        }
}

/* Tries a scale 1 / inverse with a zero point. A scale that is not finite has a NaN as its error and is not used;
 * neither is one below the smallest normal number. */
INLINE void try_scale(const struct et_nbits_tile *tile, int size, bool weighted, struct range range, const float *unit,
                      const float *inverse, const float *zero, struct best *best) {
    struct sums sums;
    float scale[BLOCKS], delta[BLOCKS];
    add_up(tile, size, weighted, range.top, inverse, zero, &sums);
    fit(&sums, range.half, inverse, scale, delta);
    for (int l = 0; l < BLOCKS; l++) {
        float ratio = unit[l] / inverse[l];
        float change = delta[l] * delta[l] * sums.dd[l] - 2.0f * delta[l] * sums.rd[l];
        float error = ratio * ratio * (sums.rr[l] + change);
        float size_of_scale = fabsf(scale[l]);
        bool better = (error < best->error[l]) & (size_of_scale >= FLT_MIN) & (size_of_scale <= FLT_MAX);
        best->error[l] = better ? error : best->error[l];
        best->scale[l] = better ? scale[l] : best->scale[l];
        best->zero[l] = better ? zero[l] : best->zero[l];
    }
}

INLINE void try_grid(const struct et_nbits_tile *tile, int size, bool weighted, struct range range,
                     const struct start *start, const float *unit, struct best *best) {
    const struct grid grid = range.top < 16.0f ? (range.symmetric ? GRID_4_SYMMETRIC : GRID_4)
                                               : (range.symmetric ? GRID_8_SYMMETRIC : GRID_8);
    float full = range.symmetric ? range.middle : range.top;
    for (int i = 0; i < grid.count; i++) {
        float more = grid.first + (float)i * grid.step, factor = (full + more) / full;
        float side = (float)(i % 3 - 1) * (more * 0.5f); /* in turn, the block is clipped below, at both ends, above */
        float inverse[BLOCKS], zero[BLOCKS];
        for (int l = 0; l < BLOCKS; l++) {
            inverse[l] = unit[l] * factor;
            float center = range.top * 0.5f - (start->high[l] * 0.5f + start->low[l] * 0.5f) * inverse[l];
            zero[l] = (clamp(center + side, 0.0f, range.top) + ROUNDING) - ROUNDING;
        }
        try_scale(tile, size, weighted, range, unit, inverse, range.symmetric ? start->zero : zero, best);
    }
}

INLINE void try_moves(const struct et_nbits_tile *tile, int size, bool weighted, struct range range, const float *unit,
                      struct best *best) {
    for (int i = 0; i < MOVES; i++) {
        float inverse[BLOCKS], zero[BLOCKS];
        float sign = range.symmetric ? MOVE_SIGN[i] : 1.0f, step = range.symmetric ? 0.0f : MOVE_ZERO[i];
        for (int l = 0; l < BLOCKS; l++) {
            inverse[l] = sign / best->scale[l];
            zero[l] = clamp(best->zero[l] + step, 0.0f, range.top);
        }
        try_scale(tile, size, weighted, range, unit, inverse, zero, best);
    }
}

/* sum w (x - scale * d)^2 in double, with the codes that encode will write: the final comparison. */
INLINE void exact_error(const struct et_nbits_tile *tile, int size, bool weighted, float top, const float *scale,
                        const float *zero, double *error) {
    float inverse[BLOCKS];
    inverses(scale, inverse);
    double sum[BLOCKS] = {0};
    for (int i = 0; i < size; i++)
        for (int l = 0; l < BLOCKS; l++) {
            float d = code_of(tile->x[i][l], inverse[l], zero[l], top) - zero[l];
            double r = (double)tile->x[i][l] - (double)scale[l] * (double)d;
            sum[l] += weighted ? (double)tile->w[i][l] * (r * r) : r * r;
        }
    memcpy(error, sum, sizeof sum);
}

/* The scale of the rule without search is kept unless another one is better. */
INLINE void search(struct et_nbits_tile *tile, int size, bool weighted, struct range range, const struct start *start,
                   const float *unit) {
    struct best best;
    for (int l = 0; l < BLOCKS; l++) {
        best.error[l] = INFINITY;
        best.scale[l] = start->scale[l];
        best.zero[l] = start->zero[l];
    }
    try_grid(tile, size, weighted, range, start, unit, &best);
    try_moves(tile, size, weighted, range, unit, &best);
    double before[BLOCKS], after[BLOCKS];
    exact_error(tile, size, weighted, range.top, start->scale, start->zero, before);
    exact_error(tile, size, weighted, range.top, best.scale, best.zero, after);
    for (int l = 0; l < BLOCKS; l++) {
        tile->scale[l] = after[l] < before[l] ? best.scale[l] : start->scale[l];
        tile->zero[l] = after[l] < before[l] ? best.zero[l] : start->zero[l];
    }
}

static void quantize_tile(struct et_nbits_tile *tile, enum et_dtype dtype, const struct et_nbits_format *format,
                          bool weighted, bool with_search) {
    const float top = (float)((1 << format->bits) - 1), middle = (float)(1 << (format->bits - 1));
    const struct range range = {top, middle, format->symmetric, format->half_scales};
    const int size = format->block_size;
    struct start start;
    load_tile(tile, dtype, size, start.low, start.high);
    cover_range(range, &start);
    memcpy(tile->scale, start.scale, sizeof tile->scale);
    memcpy(tile->zero, start.zero, sizeof tile->zero);
    float unit[BLOCKS];
    units(&start, unit);
    if (with_search && weighted)
        search(tile, size, true, range, &start, unit);
    else if (with_search && format->bits == 8)
        search(tile, size, false, range, &start, unit);
    else if (with_search)
        search_integers(tile, format, start.low, start.high, unit);
    encode(tile, size, format->bits);
}

/* --- dequantization
 * --------------------------------------------------------------------------------------------------------- */

static void dequantize_block(const uint8_t *codes, int bits, float scale, float zero, float *out /* [count] */,
                             int64_t count) {
    if (bits == 8) {
        for (int64_t i = 0; i < count; i++)
            out[i] = scale * ((float)codes[i] - zero);
        return;
    }
    for (int64_t i = 0; i < count / 2; i++) {
        out[2 * i] = scale * ((float)(codes[i] & 15) - zero);
        out[2 * i + 1] = scale * ((float)(codes[i] >> 4) - zero);
    }
    if (count % 2)
        out[count - 1] = scale * ((float)(codes[count / 2] & 15) - zero);
}

const struct et_nbits_kernels ET_KERNELS(nbits) = {quantize_tile, dequantize_block};
