/* The inner loops of compare.c and codes.c, compiled once for each instruction set (see dispatch.h). Every sum is kept
 * in sixteen partial sums, each of which sees the same operations in the same order everywhere (and nothing is
 * contracted), so the results are the same bits on every instruction set.
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
 *   u         is a - b - const up to the rounding of both differences, h |x| + h |y|. Origins are on a grid of 2^-14,
 *             so a difference of about |a| or less is exact: for |a| < 2^10 no bit is lost.
 * The last changes a divergence K by sum (p - q) du, at most sqrt(2 K) h X, and by h^2 X^2, with X^2 = E(|x| + |y|)^2.
 * K is the sum of the residues minus a term that compare.c keeps below 4 K or 1e-9. In total
 *   |error of K| <= 5 (7e-6 + 3e-6 X) K + sqrt(2 K) h X + (h X)^2 + 1e-14.
 * That is the worst case. The roundings behave like random numbers and a vocabulary has thousands of entries, so 1e-6 K
 * is usual for K above 1e-6, and 1e-3 K for 1e-11.
 */
#include "compare_kernel.h"

#include "compare_math.h"
#include "dispatch.h"
#include "half.h"

/* One lane at a time would take four times as long, so the scalar kernels use what every x86-64 has. */
#if defined(__SSE2__) && !defined(__AVX2__)
#include "simd_sse2.h"
#else
#include "simd.h"
#endif

#include <math.h>
#include <string.h>

enum { PARTIALS = 16, STEPS = ET_CHUNK / PARTIALS, SUMS = 7 };

/* The square of the |u| from which f - e + e u no longer cancels. */
#define NEAR_SQUARE 0.25f

/* Partial sums are added in a fixed tree. */
static inline double sum_fourths(const double *lane) { return (lane[0] + lane[8]) + (lane[4] + lane[12]); }

static inline double sum_partials(const double *lane /* [PARTIALS] */) {
    return (sum_fourths(lane) + sum_fourths(lane + 2)) + (sum_fourths(lane + 1) + sum_fourths(lane + 3));
}

/* --- extremes of one row
 * ------------------------------------------------------------------------------------------- */

static inline void lane_extremes(const float *row, int64_t v, float *low, float *high,
                                 int32_t *nan /* each [PARTIALS] */) {
    for (int l = 0; l < PARTIALS; l++) {
        low[l] = INFINITY;
        high[l] = -INFINITY;
        nan[l] = 0;
    }
    int64_t i = 0;
    for (; i + PARTIALS <= v; i += PARTIALS)
        for (int l = 0; l < PARTIALS; l++) {
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
    float low[PARTIALS], high[PARTIALS];
    int32_t nan[PARTIALS];
    lane_extremes(row, v, low, high, nan);
    struct et_extremes all = {.low = low[0], .high = high[0], .has_nan = nan[0] != 0};
    for (int l = 1; l < PARTIALS; l++) {
        all.high = high[l] > all.high ? high[l] : all.high;
        all.low = low[l] < all.low ? low[l] : all.low;
        all.has_nan = all.has_nan || nan[l];
    }
    return all;
}

/* Elements are compared one by one only in a vector that has a larger value. */
static int64_t first_above(const float *row, int64_t begin, int64_t end, float value) {
    int64_t i = begin;
    while (i + LANES <= end && !vm_any(vf_lt(vf_set(value), vf_load(row + i))))
        i += LANES;
    while (i < end && !(row[i] > value))
        i++;
    return i;
}

static bool excludes(const float *a /* [count] */, const float *b /* [count] */, int64_t count) {
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++)
        found |= (a[i] > -INFINITY) & (b[i] == -INFINITY);
    return found != 0;
}

static void widen_row(const uint16_t *row /* [count] */, enum et_dtype dtype, int64_t count, float *out /* [count] */) {
    et_widen(dtype, row, out, count);
}

/* --- sums over one row pair
 * ---------------------------------------------------------------------------------------- */

/* Differences from an origin are cut off here, so that they and their products with e and f stay finite in f32. */
#define FARTHEST (-0x1p64f)

/* 2^t for t in [-126, 127], 0 for -127: t = n + r with |r| <= 1/2, and a polynomial in r that is 1 at 0 and off by
 * 9.2e-8 at most (minimax of degree 5). Evaluated in pairs, for a short chain of dependent operations. */
static inline vf power_of_two(vf t) {
    const vf shifter = vf_set(12582912.0f + 127.0f); /* 1.5 * 2^23, which rounds to an integer, and the bias of f32 */
    vf shifted = t + shifter;
    vf r = t - (shifted - shifter), r2 = r * r;
    vf low = vf_set(1.0f) + vf_set(0.6931470036506653f) * r;
    vf middle = vf_set(0.24022242426872253f) + vf_set(0.05550733581185341f) * r;
    vf high = vf_set(0.009671512991189957f) + vf_set(0.001326472731307149f) * r;
    return vf_times_power(low + r2 * (middle + r2 * high), shifted);
}

/* (exp(-u) - 1 + u) / u^2 for |u| <= 1/2, off by 2.4e-8 at most (minimax of degree 5). */
static inline vf residue(vf u, vf u2) {
    vf low = vf_set(0.5f) - vf_set(0.1666666567325592f) * u;
    vf middle = vf_set(0.04166579619050026f) - vf_set(0.008333452045917511f) * u;
    vf high = vf_set(0.0013981997035443783f) - vf_set(0.0001987562864087522f) * u;
    return low + u2 * (middle + u2 * high);
}

/* Adds one vector of a row pair to sum[SUMS], and the square of u to the maximum *farthest. With ET_ANY, e and e u are
 * 0 where x is too low for f32. */
static inline void add_pairs(vf *sum, vf *farthest, vf a, vf b, vf a0, vf b0, enum et_pair_kind kind) {
    const vf log2_e = vf_set(1.44269504f), lowest = vf_set(-127.0f);
    vf x = a - a0, y = b - b0;
    if (kind == ET_ANY) { /* in this order a NaN is kept */
        x = vf_max(vf_set(FARTHEST), x);
        y = vf_max(vf_set(FARTHEST), y);
    }
    vf t = x * log2_e, s = y * log2_e;
    if (kind == ET_ANY) {
        t = vf_max(lowest, t);
        s = vf_max(lowest, s);
    }
    vf e = power_of_two(t), u = x - y, u2 = u * u, eu = e * u;
    vf divergence = eu * u * residue(u, u2), difference = eu - divergence;
    vf reverse = difference * u - divergence, f;
    if (kind == ET_NEAR) {
        f = e - difference;
        *farthest = vf_max(u2, *farthest);
    } else {
        f = power_of_two(s);
        vf far_difference = e - f;
        vm near = vf_lt(u2, vf_set(NEAR_SQUARE));
        divergence = vf_select(near, divergence, eu - far_difference);
        reverse = vf_select(near, reverse, far_difference - f * u);
        difference = vf_select(near, difference, far_difference);
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
    vf low_a, high_a, low_b, high_b, farthest;
};

static inline struct pair_extremes no_extremes(void) {
    return (struct pair_extremes){vf_set(INFINITY), vf_set(-INFINITY), vf_set(INFINITY), vf_set(-INFINITY),
                                  vf_set(0.0f)};
}

static inline void widen_extremes(struct pair_extremes *seen, vf low_a, vf high_a, vf low_b, vf high_b) {
    seen->low_a = vf_min(low_a, seen->low_a);
    seen->high_a = vf_max(high_a, seen->high_a);
    seen->low_b = vf_min(low_b, seen->low_b);
    seen->high_b = vf_max(high_b, seen->high_b);
}

/* Prefetches the cache line that is read 64 steps later; the processor's own prefetching ends at each page. Past the
 * end of a row it may be anything: a prefetch does not fault, and no pointer is formed. */
static inline void prefetch(const float *line) { __builtin_prefetch((const void *)((uintptr_t)line + 4096)); }

/* Adds up to STEPS times PARTIALS pairs to wide[], one vector of partial sums at a time, so that its sums stay in
 * registers. They are added in f32 first, and then to the doubles. */
static inline struct pair_extremes add_steps(const float *a, const float *b, int64_t steps, float a0, float b0,
                                             enum et_pair_kind kind, double (*wide)[PARTIALS] /* [SUMS] */) {
    struct pair_extremes seen = no_extremes();
    for (int lane = 0; lane < PARTIALS; lane += LANES) {
        vf sum[SUMS];
        for (int k = 0; k < SUMS; k++)
            sum[k] = vf_set(0.0f);
        for (int64_t step = 0; step < steps; step++) {
            vf va = vf_load(a + step * PARTIALS + lane), vb = vf_load(b + step * PARTIALS + lane);
            if (lane == 0) {
                prefetch(a + step * PARTIALS);
                prefetch(b + step * PARTIALS);
            }
            widen_extremes(&seen, va, va, vb, vb);
            add_pairs(sum, &seen.farthest, va, vb, vf_set(a0), vf_set(b0), kind);
        }
        for (int k = 0; k < SUMS; k++) {
            float narrow[LANES];
            memcpy(narrow, &sum[k], sizeof narrow);
            for (int l = 0; l < LANES; l++)
                wide[k][lane + l] += (double)narrow[l];
        }
    }
    return seen;
}

/* Adds the last pairs, fewer than PARTIALS, padded with logits of probability 0. */
static inline struct pair_extremes add_rest(const float *a, const float *b, int64_t count, float a0, float b0,
                                            double (*wide)[PARTIALS] /* [SUMS] */) {
    float rest_a[PARTIALS], rest_b[PARTIALS];
    for (int l = 0; l < PARTIALS; l++) {
        rest_a[l] = l < count ? a[l] : -INFINITY;
        rest_b[l] = l < count ? b[l] : -INFINITY;
    }
    add_steps(rest_a, rest_b, 1, a0, b0, ET_ANY, wide);
    struct pair_extremes seen = no_extremes();
    for (int l = 0; l < count; l++)
        widen_extremes(&seen, vf_set(a[l]), vf_set(a[l]), vf_set(b[l]), vf_set(b[l]));
    return seen;
}

static inline struct et_extremes extremes_of(vf low, vf high) {
    float lows[LANES], highs[LANES];
    memcpy(lows, &low, sizeof lows);
    memcpy(highs, &high, sizeof highs);
    struct et_extremes extremes = {.low = lows[0], .high = highs[0]};
    for (int l = 1; l < LANES; l++) {
        extremes.low = lows[l] < extremes.low ? lows[l] : extremes.low;
        extremes.high = highs[l] > extremes.high ? highs[l] : extremes.high;
    }
    return extremes;
}

static inline void note_chunk(struct et_pair_block *block, struct pair_extremes *all_seen, struct pair_extremes seen,
                              int64_t chunk) {
    block->above_a |= (uint32_t)vm_any(vf_lt(vf_set(block->limit_a), seen.high_a)) << chunk;
    block->above_b |= (uint32_t)vm_any(vf_lt(vf_set(block->limit_b), seen.high_b)) << chunk;
    widen_extremes(all_seen, seen.low_a, seen.high_a, seen.low_b, seen.high_b);
    all_seen->farthest = vf_max(seen.farthest, all_seen->farthest);
}

static inline void add_block(const float *a, const float *b, int64_t count, float a0, float b0, enum et_pair_kind kind,
                             struct et_pair_block *block) {
    double wide[SUMS][PARTIALS];
    memset(wide, 0, sizeof wide);
    struct pair_extremes seen = no_extremes();
    block->above_a = block->above_b = 0;
    int64_t chunk = 0, i = 0;
    for (; i + ET_CHUNK <= count; i += ET_CHUNK)
        note_chunk(block, &seen, add_steps(a + i, b + i, STEPS, a0, b0, kind, wide), chunk++);
    int64_t steps = (count - i) / PARTIALS;
    if (steps > 0)
        note_chunk(block, &seen, add_steps(a + i, b + i, steps, a0, b0, kind, wide), chunk);
    i += steps * PARTIALS;
    if (i < count)
        note_chunk(block, &seen, add_rest(a + i, b + i, count - i, a0, b0, wide), chunk);
    block->sums = (struct et_pair_sums){sum_partials(wide[0]), sum_partials(wide[1]), sum_partials(wide[2]),
                                        sum_partials(wide[3]), sum_partials(wide[4]), sum_partials(wide[5]),
                                        sum_partials(wide[6])};
    block->far = vm_any(vf_lt(vf_set(NEAR_SQUARE), seen.farthest));
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

/* --- coding of one row
 * --------------------------------------------------------------------------------------------- */

/* sum exp(l - max): each term rounded to f32, as llama.cpp's expf returns it, and added in double. */
static double mass_sum(const float *row /* [v] */, int64_t v, float max) {
    double lanes[PARTIALS] = {0};
    int64_t i = 0;
    for (; i + PARTIALS <= v; i += PARTIALS)
        for (int l = 0; l < PARTIALS; l++)
            lanes[l] += (float)mass((double)(row[i + l] - max));
    for (int l = 0; i + l < v; l++)
        lanes[l] += (float)mass((double)(row[i + l] - max));
    return sum_partials(lanes);
}

/* code = l > min ? round-half-even((l - min) * inverse) : 0. The argument is at most 65535.1, well below the 2^22 up to
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

const struct et_compare_kernels ET_KERNELS(compare) = {pair_block,   first_above, excludes,   widen_row,
                                                       row_extremes, mass_sum,    encode_row, decode_row};
