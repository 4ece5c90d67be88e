/* The inner loops of compare.c and codes.c, written once and compiled once per instruction set: compare_<isa>.c
 * includes this file with its own flags. Everything is spelled out in sixteen lanes, each of which does the same
 * operations in the same order everywhere (and nothing is contracted), so the results are the same bits on every
 * instruction set.
 *
 * The error of the sums over a row pair, with x = a - A, y = b - B, u = x - y, and one rounding 2^-24 = 6.0e-8 = h:
 *   e, f      power_of_two has 0.92e-7 from its polynomial and below 2 h from rounding; its argument, log2(e) x, and x
 *             itself are each rounded once and log2(e) is off by 0.2 h: together below 2.2e-7 + 1.35e-7 |x|, relative.
 *             (f of ET_NEAR is e exp(-u) with two roundings more.)
 *   sums      32 terms are added in f32 (at most 31 h = 1.9e-6, of sums of one sign), the rest in double.
 *   log sum   so a log-sum-exp, and with it nll, is off by at most 2.2e-6 + 1.35e-7 E|x|, E over the row's softmax. The
 *             entropy, log sum - E x, is off by at most (2.2e-6 + 1.35e-7 M) (1 + 2 M), M = sqrt(E x^2).
 *   residues  f - e + e u (and e - f - f u) cancel where u is small; there, |u| < 1/2, they are e u^2 P(u), with 2.4e-8
 *             from P and 6 h from rounding. Elsewhere they are at least a twentieth of what e and f contribute to them.
 *             Either way, and with the sums: below (7e-6 + 3e-6 |x|) of themselves.
 *   u         is a - b - const up to the rounding of both differences, h |x| + h |y|. Origins lie on a grid of 2^-14,
 *             so a difference of about |a| or less is exact: of |a| < 2^10 no bit is lost.
 * The last moves a divergence K by sum (p - q) du, at most sqrt(2 K) h X, and by h^2 X^2, with X^2 = E(|x| + |y|)^2.
 * And K is the sum of the residues less what compare.c keeps below 4 K or 1e-9. In full
 *   |error of K| <= 5 (7e-6 + 3e-6 X) K + sqrt(2 K) h X + (h X)^2 + 1e-14.
 * That is the worst case. As the roundings are as good as random and a vocabulary has thousands of entries, 1e-6 K is
 * usual where K is above 1e-6, and 1e-3 K where it is 1e-11.
 */
#ifndef EDGETUNE_COMPARE_KERNEL_H
#define EDGETUNE_COMPARE_KERNEL_H

#include "compare_math.h"
#include "compare_rows.h"
#include "compare_vector.h"
#include "half.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, STEPS = ET_CHUNK / LANES, SUMS = 7 };

/* The square of the |u| from which f - e + e u no longer cancels. */
#define NEAR_SQUARE 0.25f

/* Lanes are added up in a fixed tree. */
static inline double every_fourth(const double *lane) {
    return (lane[0] + lane[8]) + (lane[4] + lane[12]);
}

static inline double sum_lanes(const double *lane /* [LANES] */) {
    return (every_fourth(lane) + every_fourth(lane + 2)) + (every_fourth(lane + 1) + every_fourth(lane + 3));
}

/* --- extremes of one row ------------------------------------------------------------------------------------------- */

static inline void lane_extremes(const float *row, int64_t v, float *low, float *high,
                                 int32_t *nan /* each [LANES] */) {
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

/* A vector has to be searched one by one only if it holds what is sought. */
static int64_t first_above(const float *row, int64_t begin, int64_t end, float value) {
    int64_t i = begin;
    while (i + WIDTH <= end && !some(less(all(value), load(row + i))))
        i += WIDTH;
    while (i < end && !(row[i] > value))
        i++;
    return i;
}

static bool denies(const float *a /* [count] */, const float *b /* [count] */, int64_t count) {
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++)
        found |= (a[i] > -INFINITY) & (b[i] == -INFINITY);
    return found != 0;
}

static void widen_row(const uint16_t *row /* [count] */, enum et_dtype dtype, int64_t count, float *out /* [count] */) {
    et_widen(dtype, row, out, count);
}

/* --- sums over one row pair ---------------------------------------------------------------------------------------- */

/* What a logit is below its origin at most, so that differences and their products with e and f stay finite in f32. */
#define FARTHEST (-0x1p64f)

/* 2^t for t in [-126, 127], 0 for -127: t = n + r with |r| <= 1/2, and a polynomial in r that is 1 at 0 and off by
 * 9.2e-8 at most (minimax of degree 5). Evaluated by pairs, which makes the chain of dependent operations short. */
static inline floats power_of_two(floats t) {
    const floats shifter = all(12582912.0f + 127.0f); /* 1.5 * 2^23, which rounds to an integer, and the bias of f32 */
    floats shifted = t + shifter;
    floats r = t - (shifted - shifter), r2 = r * r;
    floats low = all(1.0f) + all(0.6931470036506653f) * r;
    floats middle = all(0.24022242426872253f) + all(0.05550733581185341f) * r;
    floats high = all(0.009671512991189957f) + all(0.001326472731307149f) * r;
    return raised(low + r2 * (middle + r2 * high), shifted);
}

/* (exp(-u) - 1 + u) / u^2 for |u| <= 1/2, off by 2.4e-8 at most (minimax of degree 5). */
static inline floats residue(floats u, floats u2) {
    floats low = all(0.5f) - all(0.1666666567325592f) * u;
    floats middle = all(0.04166579619050026f) - all(0.008333452045917511f) * u;
    floats high = all(0.0013981997035443783f) - all(0.0001987562864087522f) * u;
    return low + u2 * (middle + u2 * high);
}

/* Adds one vector of a row pair to sum[SUMS]; the square of u goes into *farthest. In ET_ANY, where x is too low for
 * f32, e is 0, and so is e u. */
static inline void add_pairs(floats *sum, floats *farthest, floats a, floats b, floats a0, floats b0,
                             enum et_pair_kind kind) {
    const floats log2_e = all(1.44269504f), lowest = all(-127.0f);
    floats x = a - a0, y = b - b0;
    if (kind == ET_ANY) { /* in this order a NaN stays */
        x = larger(all(FARTHEST), x);
        y = larger(all(FARTHEST), y);
    }
    floats t = x * log2_e, s = y * log2_e;
    if (kind == ET_ANY) {
        t = larger(lowest, t);
        s = larger(lowest, s);
    }
    floats e = power_of_two(t), u = x - y, u2 = u * u, eu = e * u;
    floats divergence = eu * u * residue(u, u2), difference = eu - divergence;
    floats reverse = difference * u - divergence, f;
    if (kind == ET_NEAR) {
        f = e - difference;
        *farthest = larger(u2, *farthest);
    } else {
        f = power_of_two(s);
        floats far_difference = e - f;
        mask near = less(u2, all(NEAR_SQUARE));
        divergence = choose(near, divergence, eu - far_difference);
        reverse = choose(near, reverse, far_difference - f * u);
        difference = choose(near, difference, far_difference);
    }
    sum[0] += e;
    sum[1] += f;
    sum[2] += e * x;
    sum[3] += f * y;
    sum[4] += difference;
    sum[5] += divergence;
    sum[6] += reverse;
}

struct pair_extremes {
    floats low_a, high_a, low_b, high_b, farthest;
};

static inline struct pair_extremes no_extremes(void) {
    return (struct pair_extremes){all(INFINITY), all(-INFINITY), all(INFINITY), all(-INFINITY), all(0.0f)};
}

static inline void widen_extremes(struct pair_extremes *seen, floats low_a, floats high_a, floats low_b,
                                  floats high_b) {
    seen->low_a = smaller(low_a, seen->low_a);
    seen->high_a = larger(high_a, seen->high_a);
    seen->low_b = smaller(low_b, seen->low_b);
    seen->high_b = larger(high_b, seen->high_b);
}

/* Asks for the line that is read 64 steps later; the processor's own guesses end at each page. Past the end of a row
 * that is the next row, or nothing: a prefetch does not fault, and no pointer is formed. */
static inline void ask_ahead(const float *line) {
    __builtin_prefetch((const void *)((uintptr_t)line + 4096));
}

/* STEPS or fewer times LANES pairs into wide[]; a vector's width of the lanes at a time, so that its sums stay in
 * registers. They are added in f32, and only then go into doubles. */
static inline struct pair_extremes add_steps(const float *a, const float *b, int64_t steps, float a0, float b0,
                                             enum et_pair_kind kind, double (*wide)[LANES] /* [SUMS] */) {
    struct pair_extremes seen = no_extremes();
    for (int lane = 0; lane < LANES; lane += WIDTH) {
        floats sum[SUMS];
        for (int k = 0; k < SUMS; k++)
            sum[k] = all(0.0f);
        for (int64_t step = 0; step < steps; step++) {
            floats va = load(a + step * LANES + lane), vb = load(b + step * LANES + lane);
            if (lane == 0) {
                ask_ahead(a + step * LANES);
                ask_ahead(b + step * LANES);
            }
            widen_extremes(&seen, va, va, vb, vb);
            add_pairs(sum, &seen.farthest, va, vb, all(a0), all(b0), kind);
        }
        for (int k = 0; k < SUMS; k++) {
            float narrow[WIDTH];
            memcpy(narrow, &sum[k], sizeof narrow);
            for (int l = 0; l < WIDTH; l++)
                wide[k][lane + l] += (double)narrow[l];
        }
    }
    return seen;
}

/* The last pairs, fewer than LANES, filled up with logits that have no mass. */
static inline struct pair_extremes add_rest(const float *a, const float *b, int64_t count, float a0, float b0,
                                            double (*wide)[LANES] /* [SUMS] */) {
    float rest_a[LANES], rest_b[LANES];
    for (int l = 0; l < LANES; l++) {
        rest_a[l] = l < count ? a[l] : -INFINITY;
        rest_b[l] = l < count ? b[l] : -INFINITY;
    }
    add_steps(rest_a, rest_b, 1, a0, b0, ET_ANY, wide);
    struct pair_extremes seen = no_extremes();
    for (int l = 0; l < count; l++)
        widen_extremes(&seen, all(a[l]), all(a[l]), all(b[l]), all(b[l]));
    return seen;
}

static inline struct et_extremes extremes_of(floats low, floats high) {
    float lows[WIDTH], highs[WIDTH];
    memcpy(lows, &low, sizeof lows);
    memcpy(highs, &high, sizeof highs);
    struct et_extremes extremes = {.low = lows[0], .high = highs[0]};
    for (int l = 1; l < WIDTH; l++) {
        extremes.low = lows[l] < extremes.low ? lows[l] : extremes.low;
        extremes.high = highs[l] > extremes.high ? highs[l] : extremes.high;
    }
    return extremes;
}

static inline void note_chunk(struct et_pair_block *block, struct pair_extremes *all_seen, struct pair_extremes seen,
                              int64_t chunk) {
    block->above_a |= (uint32_t)some(less(all(block->limit_a), seen.high_a)) << chunk;
    block->above_b |= (uint32_t)some(less(all(block->limit_b), seen.high_b)) << chunk;
    widen_extremes(all_seen, seen.low_a, seen.high_a, seen.low_b, seen.high_b);
    all_seen->farthest = larger(seen.farthest, all_seen->farthest);
}

static inline void add_block(const float *a, const float *b, int64_t count, float a0, float b0, enum et_pair_kind kind,
                             struct et_pair_block *block) {
    double wide[SUMS][LANES];
    memset(wide, 0, sizeof wide);
    struct pair_extremes seen = no_extremes();
    block->above_a = block->above_b = 0;
    int64_t chunk = 0, i = 0;
    for (; i + ET_CHUNK <= count; i += ET_CHUNK)
        note_chunk(block, &seen, add_steps(a + i, b + i, STEPS, a0, b0, kind, wide), chunk++);
    int64_t steps = (count - i) / LANES;
    if (steps > 0)
        note_chunk(block, &seen, add_steps(a + i, b + i, steps, a0, b0, kind, wide), chunk);
    i += steps * LANES;
    if (i < count)
        note_chunk(block, &seen, add_rest(a + i, b + i, count - i, a0, b0, wide), chunk);
    block->sums = (struct et_pair_sums){sum_lanes(wide[0]), sum_lanes(wide[1]), sum_lanes(wide[2]), sum_lanes(wide[3]),
                                        sum_lanes(wide[4]), sum_lanes(wide[5]), sum_lanes(wide[6])};
    block->far = some(less(all(NEAR_SQUARE), seen.farthest));
    block->reference = extremes_of(seen.low_a, seen.high_a);
    block->other = extremes_of(seen.low_b, seen.high_b);
}

/* The loop is compiled once for each kind. */
static void pair_block(const float *a /* [count] */, const float *b /* [count] */, int64_t count, float a0, float b0,
                       enum et_pair_kind kind, struct et_pair_block *block) {
    if (kind == ET_NEAR)
        add_block(a, b, count, a0, b0, ET_NEAR, block);
    else if (kind == ET_PLAIN)
        add_block(a, b, count, a0, b0, ET_PLAIN, block);
    else
        add_block(a, b, count, a0, b0, ET_ANY, block);
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
#define ET_ROW_KERNELS \
    {pair_block, first_above, denies, widen_row, row_extremes, mass_sum, encode_row, decode_row}

#endif
