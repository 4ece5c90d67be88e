/* The searches for the scale (and the minimum) of sub-blocks, lane-wise and STREAMS sub-blocks at a time. Included by
 * quantize_kernel.c. The comment of each names the function of libggml's ggml-quants.c that has the same result, bit
 * for bit.
 *
 * The searches do not keep levels. They keep the inverse scale of the best try, from which the levels follow.
 */
#ifndef EDGETUNE_QUANTIZE_SEARCH_H
#define EDGETUNE_QUANTIZE_SEARCH_H

#include "simd.h"

/* Within these bounds no inverse scale overflows and every level that is rounded the short way is below 2^22. */
#define PROVEN_MAX 0x1p60f     /* of |x| */
#define PROVEN_RANGE 0x1p-100f /* of max - min in a sub-block, where it is not 0 */

#define GROUP_MAX_EPS 1e-15f /* a sub-block with no larger value counts as zero */

/* nearest_int for |a| < 2^22. */
INLINE vf round_small(vf a) { return vf_sub(vf_add(a, vf_set(ROUNDING)), vf_set(ROUNDING)); }

/* nearest_int for all numbers, also where its result makes no sense. */
INLINE vi round_any(vf a) {
    vi bits = vi_bits_of(vf_add(a, vf_set(ROUNDING)));
    return vi_sub(vi_and(bits, vi_set(0x7fffff)), vi_set(0x400000));
}

static inline int nearest_int(float value) {
    float shifted = value + ROUNDING;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int)(bits & 0x7fffff) - 0x400000;
}

INLINE vf clamp(vf a, float low, float high) { return vf_max(vf_min(a, vf_set(high)), vf_set(low)); }

INLINE vi clamp_int(vi a, int low, int high) { return vi_max(vi_min(a, vi_set(high)), vi_set(low)); }

/* --- scale and minimum: x is about scale * level + minimum
 * ---------------------------------------------------------- */

struct min_fit {
    vf scale, minimum;
    vf inverse, low; /* level = nearest(inverse * (x - low)), clamped to 0 .. top */
    vm proven;       /* all ranges were large enough for the result to be that of libggml */
};

struct min_search {
    int n;             /* elements of a sub-block */
    float top;         /* the highest level, at most 31 */
    float first, step; /* inverse scales tried: (first + step * i + top) / (max - minimum so far), i = 0 .. steps */
    int steps;
    bool absolute; /* the error is |difference|, not its square */
};

struct min_range {
    vf low, high; /* of x */
    vf sum_w, sum_x;
};

INLINE struct min_range range_of(const vf *x, const vf *w, int n) {
    struct min_range r = {x[0], x[0], w[0], vf_mul(w[0], x[0])};
    for (int i = 1; i < n; i++) {
        r.low = vf_min(x[i], r.low);
        r.high = vf_max(x[i], r.high);
        r.sum_w = vf_add(r.sum_w, w[i]);
        r.sum_x = vf_add(r.sum_x, vf_mul(w[i], x[i]));
    }
    return r;
}

/* Whether |inverse * (x - minimum)| is at most 32 * 2^16 for all x, and the inverse is finite. */
INLINE vm range_is_large(struct min_range r, vf minimum, vf range) {
    vm large = vf_le(vf_abs(vf_sub(r.low, minimum)), vf_mul(range, vf_set(0x1p16f)));
    return vm_and(large, vf_le(vf_set(PROVEN_RANGE), range));
}

INLINE vf level_above(vf x, vf minimum, vf inverse, float top) {
    vf shifted = vf_add(vf_mul(inverse, vf_sub(x, minimum)), vf_set(ROUNDING));
    return vf_sub(vf_max(vf_min(shifted, vf_set(ROUNDING + top)), vf_set(ROUNDING)), vf_set(ROUNDING));
}

INLINE vf weighted_error(vf scale, vf level, vf minimum, vf x, vf w, bool absolute) {
    vf difference = vf_sub(vf_add(vf_mul(scale, level), minimum), x);
    return vf_mul(w, absolute ? vf_abs(difference) : vf_mul(difference, difference));
}

/* The state before the search: the scale from minimum to maximum and its error. */
INLINE void start_min_search(const vf *x, const vf *w, struct min_search how, struct min_range *r, struct min_fit *fit,
                             vf *best) {
    for (int s = 0; s < STREAMS; s++) {
        r[s] = range_of(x + s * how.n, w + s * how.n, how.n);
        vf low = vf_select(vf_lt(vf_set(0), r[s].low), vf_set(0), r[s].low), range = vf_sub(r[s].high, low);
        vf inverse = vf_div(vf_set(how.top), range);
        fit[s] = (struct min_fit){vf_div(vf_set(1), inverse), low, inverse, low, range_is_large(r[s], low, range)};
        best[s] = vf_set(0);
        for (int i = s * how.n; i < (s + 1) * how.n; i++) {
            vf level = level_above(x[i], low, inverse, how.top);
            best[s] = vf_add(best[s], weighted_error(fit[s].scale, level, low, x[i], w[i], how.absolute));
        }
    }
}

/* make_qkx2_quants and make_qkx3_quants of x and w [STREAMS][n]. */
INLINE void search_scale_and_min(const vf *x, const vf *w, struct min_search how, struct min_fit *fit /* [STREAMS] */) {
    vf levels[STREAMS * 32], best[STREAMS]; /* levels of this try */
    struct min_range r[STREAMS];
    start_min_search(x, w, how, r, fit, best);
    for (int is = 0; is <= how.steps; is++) {
        vf sum_l[STREAMS], sum_l2[STREAMS], sum_xl[STREAMS], inverse[STREAMS], low[STREAMS];
        vf scale[STREAMS], minimum[STREAMS], error[STREAMS];
        vm possible[STREAMS];
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            low[s] = fit[s].minimum;
            vf range = vf_sub(r[s].high, low[s]);
            inverse[s] = vf_div(vf_set(how.first + how.step * (float)is + how.top), range);
            fit[s].proven = vm_and(fit[s].proven, range_is_large(r[s], low[s], range));
            sum_l[s] = sum_l2[s] = sum_xl[s] = error[s] = vf_set(0);
        }
        for (int i = 0; i < how.n; i++)
#pragma GCC unroll 4
            for (int s = 0; s < STREAMS; s++) {
                vf xi = x[s * how.n + i], level = level_above(xi, low[s], inverse[s], how.top);
                vf wl = vf_mul(w[s * how.n + i], level);
                levels[s * how.n + i] = level;
                sum_l[s] = vf_add(sum_l[s], wl);
                sum_l2[s] = vf_add(sum_l2[s], vf_mul(wl, level));
                sum_xl[s] = vf_add(sum_xl[s], vf_mul(wl, xi));
            }
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            vf determinant = vf_sub(vf_mul(r[s].sum_w, sum_l2[s]), vf_mul(sum_l[s], sum_l[s]));
            possible[s] = vf_lt(vf_set(0), determinant);
            scale[s] = vf_div(vf_sub(vf_mul(r[s].sum_w, sum_xl[s]), vf_mul(r[s].sum_x, sum_l[s])), determinant);
            minimum[s] = vf_div(vf_sub(vf_mul(sum_l2[s], r[s].sum_x), vf_mul(sum_l[s], sum_xl[s])), determinant);
            vm positive = vf_lt(vf_set(0), minimum[s]);
            if (vm_bits(positive)) {
                minimum[s] = vf_select(positive, vf_set(0), minimum[s]);
                scale[s] = vf_select(positive, vf_div(sum_xl[s], sum_l2[s]), scale[s]);
            }
        }
        for (int i = 0; i < how.n; i++)
#pragma GCC unroll 4
            for (int s = 0; s < STREAMS; s++)
                error[s] = vf_add(error[s], weighted_error(scale[s], levels[s * how.n + i], minimum[s],
                                                           x[s * how.n + i], w[s * how.n + i], how.absolute));
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            vm better = vm_and(possible[s], vf_lt(error[s], best[s]));
            best[s] = vf_select(better, error[s], best[s]);
            fit[s].scale = vf_select(better, scale[s], fit[s].scale);
            fit[s].minimum = vf_select(better, minimum[s], fit[s].minimum);
            fit[s].inverse = vf_select(better, inverse[s], fit[s].inverse);
            fit[s].low = vf_select(better, low[s], fit[s].low);
        }
    }
    for (int s = 0; s < STREAMS; s++) { /* all elements are equal and not above 0: libggml does not search */
        vm flat = vm_and(vf_eq(r[s].high, r[s].low), vf_le(r[s].low, vf_set(0)));
        fit[s].scale = vf_select(flat, vf_set(0), fit[s].scale);
        fit[s].inverse = vf_select(flat, vf_set(0), fit[s].inverse);
        fit[s].minimum = vf_select(flat, r[s].low, fit[s].minimum);
        fit[s].low = vf_select(flat, r[s].low, fit[s].low);
        fit[s].proven = vm_or(fit[s].proven, flat);
    }
}

/* The levels of the best try. */
INLINE vi level_of_min_fit(vf x, struct min_fit fit, float top) {
    return vi_trunc(level_above(x, fit.low, fit.inverse, top));
}

/* --- scale alone: x is about scale * level, level in -half .. half - 1
 * ----------------------------------------------- */

struct scale_fit {
    vf scale;
    vf inverse; /* level = nearest(inverse * x), clamped */
    vm zero;    /* too small: the scale is 0, and so is the level counted from -half */
};

/* The element of largest size, the first of equal ones. */
INLINE vf peak_of(const vf *x, int n, vf *amount) {
    vf peak = vf_set(0);
    *amount = vf_set(0);
    for (int i = 0; i < n; i++) {
        vf a = vf_abs(x[i]);
        vm larger = vf_lt(*amount, a);
        *amount = vf_select(larger, a, *amount);
        peak = vf_select(larger, x[i], peak);
    }
    return peak;
}

INLINE vf level_of_scale(vf inverse, vf x, float half) {
    return clamp(round_small(vf_mul(inverse, x)), -half, half - 1);
}

struct scale_sums {
    vf lx, l2; /* of w x level and of w level level */
};

INLINE void add_scale_sums(const vf *x, const vf *w, const vf *wx, int n, float half, int streams, const vf *inverse,
                           struct scale_sums *sums /* [streams] */) {
    vf lx[STREAMS], l2[STREAMS];
#pragma GCC unroll 4
    for (int s = 0; s < streams; s++)
        lx[s] = l2[s] = vf_set(0);
    for (int i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int s = 0; s < streams; s++) {
            vf level = level_of_scale(inverse[s], x[s * n + i], half);
            lx[s] = vf_add(lx[s], vf_mul(wx[s * n + i], level));
            l2[s] = vf_add(l2[s], vf_mul(vf_mul(w[s * n + i], level), level));
        }
#pragma GCC unroll 4
    for (int s = 0; s < streams; s++)
        sums[s] = (struct scale_sums){lx[s], l2[s]};
}

/* make_qx_quants(n, half, x, L, 1, w) of x and w [streams][n]. */
INLINE void search_scale(const vf *x, const vf *w, int n, float half, int streams, struct scale_fit *fit) {
    vf wx[STREAMS * 32], peak[STREAMS], inverse[STREAMS], best[STREAMS];
    struct scale_sums sums[STREAMS];
    for (int s = 0; s < streams; s++) {
        vf amount;
        peak[s] = peak_of(x + s * n, n, &amount);
        fit[s].zero = vf_lt(amount, vf_set(GROUP_MAX_EPS));
        inverse[s] = vf_div(vf_set(-half), peak[s]);
        for (int i = 0; i < n; i++)
            wx[s * n + i] = vf_mul(w[s * n + i], x[s * n + i]);
    }
    add_scale_sums(x, w, wx, n, half, streams, inverse, sums);
    for (int s = 0; s < streams; s++) {
        fit[s].scale = vf_select(vf_eq(sums[s].l2, vf_set(0)), vf_set(0), vf_div(sums[s].lx, sums[s].l2));
        fit[s].inverse = inverse[s];
        best[s] = vf_mul(fit[s].scale, sums[s].lx);
    }
    for (int is = -9; is <= 9; is++) {
        if (is == 0)
            continue;
#pragma GCC unroll 4
        for (int s = 0; s < streams; s++)
            inverse[s] = vf_div(vf_set(-(half + 0.1f * (float)is)), peak[s]);
        add_scale_sums(x, w, wx, n, half, streams, inverse, sums);
#pragma GCC unroll 4
        for (int s = 0; s < streams; s++) {
            vf scale = vf_div(sums[s].lx, sums[s].l2);
            vm better = vf_lt(vf_mul(best[s], sums[s].l2), vf_mul(sums[s].lx, sums[s].lx));
            better = vm_and(better, vf_lt(vf_set(0), sums[s].l2));
            fit[s].scale = vf_select(better, scale, fit[s].scale);
            fit[s].inverse = vf_select(better, inverse[s], fit[s].inverse);
            best[s] = vf_select(better, vf_mul(scale, sums[s].lx), best[s]);
        }
    }
    for (int s = 0; s < streams; s++) {
        fit[s].scale = vf_select(fit[s].zero, vf_set(0), fit[s].scale);
        fit[s].inverse = vf_select(fit[s].zero, vf_set(0), fit[s].inverse);
    }
}

/* Counted from -half, as it is stored. */
INLINE vi level_of_scale_fit(vf x, struct scale_fit fit, float half) {
    vi level = vi_trunc(vf_add(level_of_scale(fit.inverse, x, half), vf_set(half)));
    return vi_select(fit.zero, vi_set(0), level);
}

/* --- scale alone, by changing one level at a time --------------------------------------------------------------- */

/* make_q3_quants(n, half, x, L, true) of x [LEVEL_STREAMS][n]; levels likewise, counted from -half.
 * Each step waits for a division, so more sub-blocks are interleaved than fit the registers. */
enum { LEVEL_STREAMS = 4 };

INLINE void search_scale_by_level(const vf *x, int n, float half, vf *scale /* [LEVEL_STREAMS] */, vi *levels) {
    vf level[LEVEL_STREAMS * 16], sum_lx[LEVEL_STREAMS], sum_l2[LEVEL_STREAMS];
    vm zero[LEVEL_STREAMS];
#pragma GCC unroll 4
    for (int s = 0; s < LEVEL_STREAMS; s++) {
        vf amount, peak = peak_of(x + s * n, n, &amount);
        zero[s] = vf_lt(amount, vf_set(GROUP_MAX_EPS));
        vf inverse = vf_div(vf_set(-half), peak);
        sum_lx[s] = sum_l2[s] = vf_set(0);
        for (int i = 0; i < n; i++) {
            vf xi = x[s * n + i], w = vf_mul(xi, xi), l = level_of_scale(inverse, xi, half);
            level[s * n + i] = l;
            sum_lx[s] = vf_add(sum_lx[s], vf_mul(vf_mul(w, xi), l));
            sum_l2[s] = vf_add(sum_l2[s], vf_mul(vf_mul(w, l), l));
        }
    }
    /* A round that changes nothing in a lane changes nothing in later rounds either, so all lanes may continue. */
    for (int round = 0; round < 5; round++) {
        vm changed = vm_not(vm_all());
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int s = 0; s < LEVEL_STREAMS; s++) {
                vf xi = x[s * n + i], w = vf_mul(xi, xi), wx = vf_mul(w, xi), old = level[s * n + i];
                vf lx = vf_sub(sum_lx[s], vf_mul(wx, old)), l2 = vf_sub(sum_l2[s], vf_mul(vf_mul(w, old), old));
                vf wanted = vf_of_vi(clamp_int(round_any(vf_div(vf_mul(xi, l2), lx)), -(int)half, (int)half - 1));
                vf new_lx = vf_add(lx, vf_mul(wx, wanted)), new_l2 = vf_add(l2, vf_mul(vf_mul(w, wanted), wanted));
                vm better =
                    vf_lt(vf_mul(vf_mul(sum_lx[s], sum_lx[s]), new_l2), vf_mul(vf_mul(new_lx, new_lx), sum_l2[s]));
                better = vm_and(vm_and(better, vf_lt(vf_set(0), lx)), vf_lt(vf_set(0), new_l2));
                better = vm_and(better, vm_not(vf_eq(wanted, old)));
                level[s * n + i] = vf_select(better, wanted, old);
                sum_lx[s] = vf_select(better, new_lx, sum_lx[s]);
                sum_l2[s] = vf_select(better, new_l2, sum_l2[s]);
                changed = vm_or(changed, better);
            }
        if (!vm_bits(changed))
            break;
    }
    for (int s = 0; s < LEVEL_STREAMS; s++) {
        vf found = vf_select(vf_lt(vf_set(0), sum_l2[s]), vf_div(sum_lx[s], sum_l2[s]), vf_set(0));
        scale[s] = vf_select(zero[s], vf_set(0), found);
        for (int i = 0; i < n; i++)
            levels[s * n + i] = vi_select(zero[s], vi_set(0), vi_trunc(vf_add(level[s * n + i], vf_set(half))));
    }
}

/* --- one scale for the scales (or minima) of a super-block
 * ------------------------------------------------------------- */

/* make_qp_quants(n, top, x, L, w) of x, w and levels [n]: x is about scale * level, level in 0 .. top and stored in 8
 * bits. */
INLINE vf search_positive_scale(const vf *x, const vf *w, int n, int top, vi *levels) {
    const vi byte = vi_set(0xff);
    vf high = vf_set(0);
    for (int i = 0; i < n; i++)
        high = vf_max(high, x[i]);
    vm zero = vf_lt(high, vf_set(GROUP_MAX_EPS));
    vf inverse = vf_div(vf_set((float)top), high), best = vf_set(0), unit = vf_div(vf_set(1), inverse);
    for (int i = 0; i < n; i++) {
        vf level = vf_of_vi(vi_and(round_any(vf_mul(inverse, x[i])), byte));
        vf difference = vf_sub(x[i], vf_mul(unit, level));
        best = vf_add(best, vf_mul(vf_mul(w[i], difference), difference));
    }
    for (int is = -4; is <= 4; is++) {
        if (is == 0)
            continue;
        vf tried = vf_div(vf_set(0.1f * (float)is + (float)top), high), error = vf_set(0);
        unit = vf_div(vf_set(1), tried);
        for (int i = 0; i < n; i++) {
            vf level = vf_of_vi(vi_min(round_any(vf_mul(tried, x[i])), vi_set(top)));
            vf difference = vf_sub(x[i], vf_mul(unit, level));
            error = vf_add(error, vf_mul(vf_mul(w[i], difference), difference));
        }
        vm better = vf_lt(error, best);
        best = vf_select(better, error, best);
        inverse = vf_select(better, tried, inverse);
    }
    vf sum_lx = vf_set(0), sum_l2 = vf_set(0);
    for (int i = 0; i < n; i++) {
        vi level = vi_min(round_any(vf_mul(inverse, x[i])), vi_set(top));
        levels[i] = vi_and(level, byte);
        vf l = vf_of_vi(level);
        sum_lx = vf_add(sum_lx, vf_mul(vf_mul(w[i], x[i]), l));
        sum_l2 = vf_add(sum_l2, vf_mul(vf_mul(w[i], l), l));
    }
    for (int round = 0; round < 5; round++) {
        vm changed = vm_not(vm_all());
        for (int i = 0; i < n; i++) {
            vf wx = vf_mul(w[i], x[i]), old = vf_of_vi(levels[i]);
            vf lx = vf_sub(sum_lx, vf_mul(wx, old)), l2 = vf_sub(sum_l2, vf_mul(vf_mul(w[i], old), old));
            vi wanted = vi_min(round_any(vf_div(vf_mul(x[i], l2), lx)), vi_set(top));
            vf l = vf_of_vi(wanted);
            vf new_lx = vf_add(lx, vf_mul(wx, l)), new_l2 = vf_add(l2, vf_mul(vf_mul(w[i], l), l));
            vm better = vf_lt(vf_mul(vf_mul(sum_lx, sum_lx), new_l2), vf_mul(vf_mul(new_lx, new_lx), sum_l2));
            better = vm_and(vm_and(better, vf_lt(vf_set(0), lx)), vf_lt(vf_set(0), l2));
            better = vm_and(better, vm_not(vi_eq(wanted, levels[i])));
            levels[i] = vi_select(better, vi_and(wanted, byte), levels[i]);
            sum_lx = vf_select(better, new_lx, sum_lx);
            sum_l2 = vf_select(better, new_l2, sum_l2);
            changed = vm_or(changed, better);
        }
        if (!vm_bits(changed))
            break;
    }
    for (int i = 0; i < n; i++)
        levels[i] = vi_select(zero, vi_set(0), levels[i]);
    vf found = vf_select(vf_lt(vf_set(0), sum_l2), vf_div(sum_lx, sum_l2), vf_set(0));
    return vf_select(zero, vf_set(0), found);
}

#endif
