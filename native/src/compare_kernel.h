/* The inner loops of compare.c and codes.c, written once and compiled once per instruction set: compare_<isa>.c includes
 * this file with its own flags. There are no intrinsics: sixteen lanes are spelled out as short loops that the compiler
 * turns into vectors of whatever width it was given. Each lane does the same operations in the same order everywhere
 * (and nothing is contracted), so the results are the same bits on every instruction set.
 */
#ifndef EDGETUNE_COMPARE_KERNEL_H
#define EDGETUNE_COMPARE_KERNEL_H

#include "compare_rows.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, SEARCH_BLOCK = 256 };

/* Below this a probability, relative to the largest of its row, counts as none: exp(-708) is the end of normal doubles. */
#define LOWEST_EXPONENT (-708.0)

/* exp(x) for x in [-708, 0], relative error below 4e-16 (tested against libm): x = n ln2 + r with |r| <= 0.347, then
 * the Taylor polynomial of degree 13 (its remainder is below 5e-18) and 2^n put into the exponent. */
static inline double exponential(double x) {
    const double shifter = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer, kept in the low bits */
    double shifted = x * 1.4426950408889634 + shifter;
    double n = shifted - shifter;
    double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* exp(x) for x <= 0 with -inf allowed; 0 below LOWEST_EXPONENT. */
static inline double mass(double x) {
    double e = exponential(x > LOWEST_EXPONENT ? x : LOWEST_EXPONENT);
    return x > LOWEST_EXPONENT ? e : 0.0;
}

/* Lanes are added up in a fixed tree. */
static inline double sum_lanes(const double *lane /* [LANES] */) {
    double sum[LANES];
    memcpy(sum, lane, sizeof sum);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            sum[i] += sum[i + half];
    return sum[0];
}

/* --- extremes of one row ------------------------------------------------------------------------------------------- */

static inline void lane_extremes(const float *row, int64_t v, float *low, float *high, int32_t *nan /* each [LANES] */) {
    for (int l = 0; l < LANES; l++) {
        low[l] = INFINITY;
        high[l] = -INFINITY;
        nan[l] = 0;
    }
    int64_t i = 0;
    for (; i + LANES <= v; i += LANES)
        for (int l = 0; l < LANES; l++) {
            float x = row[i + l];
            high[l] = x > high[l] ? x : high[l];
            low[l] = x < low[l] ? x : low[l];
            nan[l] |= x != x;
        }
    for (int l = 0; i + l < v; l++) {
        float x = row[i + l];
        high[l] = x > high[l] ? x : high[l];
        low[l] = x < low[l] ? x : low[l];
        nan[l] |= x != x;
    }
}

static struct et_extremes row_extremes(const float *row /* [v] */, int64_t v) {
    float low[LANES], high[LANES];
    int32_t nan[LANES];
    lane_extremes(row, v, low, high, nan);
    struct et_extremes all = {.low = low[0], .high = high[0], .has_nan = nan[0] != 0};
    for (int l = 1; l < LANES; l++) {
        all.high = high[l] > all.high ? high[l] : all.high;
        all.low = low[l] < all.low ? low[l] : all.low;
        all.has_nan = all.has_nan || nan[l];
    }
    return all;
}

/* The lowest index that holds `value`, which is in the row. Whole blocks are tested at once: no early exit inside. */
static int64_t first_index_of(const float *row /* [v] */, int64_t v, float value) {
    int64_t begin = 0;
    for (; begin + SEARCH_BLOCK <= v; begin += SEARCH_BLOCK) {
        int32_t found = 0;
        for (int i = 0; i < SEARCH_BLOCK; i++)
            found |= row[begin + i] == value;
        if (found)
            break;
    }
    while (begin < v - 1 && row[begin] != value)
        begin++;
    return begin;
}

/* --- sums over one row pair ---------------------------------------------------------------------------------------- */

struct pair_lanes {
    double reference[LANES], other[LANES], cross[LANES];
};

/* One step of LANES logits; a0 and b0 are the maxima of the rows. Where the reference has no mass nothing is added (a
 * select, not a product: 0 * inf would be NaN); where only the other has none, the difference is +inf, as it should. */
static inline void add_pairs(struct pair_lanes *sums, const float *a, const float *b, double a0, double b0) {
    double ea[LANES], eb[LANES], term[LANES];
    for (int l = 0; l < LANES; l++)
        ea[l] = mass((double)a[l] - a0);
    for (int l = 0; l < LANES; l++)
        eb[l] = mass((double)b[l] - b0);
    for (int l = 0; l < LANES; l++) {
        double product = ea[l] * (((double)a[l] - a0) - ((double)b[l] - b0));
        term[l] = ea[l] > 0.0 ? product : 0.0;
    }
    for (int l = 0; l < LANES; l++) {
        sums->reference[l] += ea[l];
        sums->other[l] += eb[l];
        sums->cross[l] += term[l];
    }
}

static struct et_pair_sums pair_sums(const float *a /* [v] */, const float *b /* [v] */, int64_t v, float a0, float b0) {
    struct pair_lanes lanes;
    memset(&lanes, 0, sizeof lanes);
    int64_t i = 0;
    for (; i + LANES <= v; i += LANES)
        add_pairs(&lanes, a + i, b + i, a0, b0);
    if (i < v) { /* the rest, filled up with logits that have no mass */
        float rest_a[LANES], rest_b[LANES];
        for (int l = 0; l < LANES; l++) {
            rest_a[l] = i + l < v ? a[i + l] : -INFINITY;
            rest_b[l] = i + l < v ? b[i + l] : -INFINITY;
        }
        add_pairs(&lanes, rest_a, rest_b, a0, b0);
    }
    return (struct et_pair_sums){sum_lanes(lanes.reference), sum_lanes(lanes.other), sum_lanes(lanes.cross)};
}

/* --- coding of one row --------------------------------------------------------------------------------------------- */

/* sum exp(l - max), each term rounded to f32 as llama.cpp's expf gives it, added in double. */
static double mass_sum(const float *row /* [v] */, int64_t v, float max) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= v; i += LANES)
        for (int l = 0; l < LANES; l++)
            lanes[l] += (float)mass((double)(row[i + l] - max));
    for (int l = 0; i + l < v; l++)
        lanes[l] += (float)mass((double)(row[i + l] - max));
    return sum_lanes(lanes);
}

/* code = l > min ? round-half-even((l - min) * inverse) : 0; the argument is at most 65535.1, far inside the 2^22 for
 * which adding 1.5 * 2^23 leaves the rounded integer in the low bits. */
static void encode_row(const float *row /* [v] */, int64_t v, float min, float inverse, uint16_t *codes /* [v] */) {
    for (int64_t i = 0; i < v; i++) {
        float above = row[i] > min ? row[i] - min : 0.0f;
        float shifted = inverse * above + 12582912.0f;
        uint32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        codes[i] = (uint16_t)bits;
    }
}

static void decode_row(const uint16_t *codes /* [v] */, int64_t v, float scale, float min, float *out /* [v] */) {
    for (int64_t i = 0; i < v; i++)
        out[i] = scale * (float)codes[i] + min;
}

/* What compare_<isa>.c defines: the table of this instruction set. */
#define ET_ROW_KERNELS {row_extremes, first_index_of, pair_sums, mass_sum, encode_row, decode_row}

#endif
