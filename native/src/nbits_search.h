/* The search for the scale and zero point of blocks of 4-bit codes without importance weights, in 16-bit integers:
 * twice as many fit a vector, and their sums do not depend on the order.
 *
 * A block is x, integers from -32767 to 32767: its values in steps about a thousand times finer than the steps of its
 * codes. A trial is a scale and a zero point, which give codes d (minus the zero point). The best scale for these codes
 * is sum x d / sum d d, with the error sum x x - (sum x d)^2 / sum d d. So the best trial has the largest gain,
 * (sum x d)^2 / sum d d. Its error in the values themselves is then compared with that of the rule without search.
 */
#ifndef EDGETUNE_NBITS_SEARCH_H
#define EDGETUNE_NBITS_SEARCH_H

#include "half.h"
#include "nbits_lanes.h"

#define PEAK 32767.0f
enum {
    STEP = 1024, /* codes are rounded from numbers in units of 1 / STEP: 32 steps fit */
    TRIALS = 3   /* at once, so that each value is loaded once for all of them */
};

/* LANES blocks from `first` on. */
struct search {
    const struct et_nbits_tile *tile;
    int first, size;
    bool symmetric, half;
    vf grain;             /* the value of the integer 1 */
    vf unit;              /* the inverse of the scale of the rule without search; 0: no search */
    vf gain, scale, zero; /* of the best so far; the scale in units of grain */
};

struct trial {
    vi multiplier, low, high; /* from values to STEPs; the smallest and largest code, minus the zero point */
    vf zero;
};

/* An integer of at most 32767 in both halves of a word: adding ROUNDING leaves it in the low bits. */
INLINE vi vi_twice(vf number) {
    vi bits = vi_and(vi_bits_of(vf_add(number, vf_set(ROUNDING))), vi_set(0xffff));
    return vi_or(bits, vi_shl(bits, 16));
}

/* Fills tile->pairs: the values as integers. */
INLINE void make_integers(struct et_nbits_tile *tile, int first, int size, vf factor) {
    const vf rounder = vf_set(ROUNDING);
    for (int i = 0; i < size / 2; i++) {
        vi low = vi_bits_of(vf_add(vf_mul(vf_load(&tile->x[2 * i][first]), factor), rounder));
        vi high = vi_bits_of(vf_add(vf_mul(vf_load(&tile->x[2 * i + 1][first]), factor), rounder));
        vi_store(&tile->pairs[i][first], vi_or(vi_and(low, vi_set(0xffff)), vi_shl(high, 16)));
    }
}

/* `steps`: the largest value in STEPs. */
INLINE struct trial trial_of(vf steps, vf zero) {
    vf multiplier = vf_clamp(steps, vf_set(-PEAK), vf_set(PEAK));
    return (struct trial){vi_twice(multiplier), vi_twice(vf_neg(zero)), vi_twice(vf_sub(vf_set(15), zero)), zero};
}

/* Keeps the codes of a trial with their best scale if they are the best so far. */
INLINE void keep_better(struct search *search, vi products, vi squares, vf zero) {
    vf product = vf_of_vi(products), square = vf_of_vi(squares);
    vf scale = vf_div(product, vf_max(square, vf_set(1))); /* if all d are 0, so is the product */
    if (search->half) {
        float stored[LANES];
        vf_store(stored, vf_mul(scale, search->grain));
        for (int l = 0; l < LANES; l++)
            stored[l] = round_f16(stored[l]);
        scale = vf_div(vf_load(stored), search->grain);
    }
    vf gain = vf_mul(scale, vf_sub(vf_add(product, product), vf_mul(scale, square)));
    vm better = vf_lt(search->gain, gain);
    search->gain = vf_select(better, gain, search->gain);
    search->scale = vf_select(better, scale, search->scale);
    search->zero = vf_select(better, zero, search->zero);
}

INLINE void try_all(struct search *search, const struct trial *trials) {
    vi products[TRIALS], squares[TRIALS];
    const vi to_steps = vi_set((32768 / STEP) * 0x10001);
#pragma GCC unroll 3
    for (int t = 0; t < TRIALS; t++)
        products[t] = squares[t] = vi_set(0);
    for (int i = 0; i < search->size / 2; i++) {
        vi x = vi_load(&search->tile->pairs[i][search->first]);
#pragma GCC unroll 3
        for (int t = 0; t < TRIALS; t++) {
            vi d = vi_halves_mul(vi_halves_mul(x, trials[t].multiplier), to_steps);
            d = vi_halves_min(vi_halves_max(d, trials[t].low), trials[t].high);
            products[t] = vi_add(products[t], vi_halves_dot(x, d));
            squares[t] = vi_add(squares[t], vi_halves_dot(d, d));
        }
    }
    for (int t = 0; t < TRIALS; t++)
        keep_better(search, products[t], squares[t], trials[t].zero);
}

/* The grid of scales to try first: scale i is the one that covers the range, times full / (full + first + i * step),
 * where full is 15, or 8 if symmetric. Above 0, the block is clipped, in turn below, at both ends and above. Below 0,
 * it gains only where its values happen to be near the steps. */
enum { GRID = 9, ROUNDS = 2 };
static const float GRID_FIRST = -1.25f, GRID_STEP = 0.6875f, GRID_SYMMETRIC_STEP = 0.71875f;

INLINE void search_grid(struct search *search, vf low, vf high, vf peak) {
    const float full = search->symmetric ? 8 : 15, step = search->symmetric ? GRID_SYMMETRIC_STEP : GRID_STEP;
    vf whole = vf_mul(vf_mul(search->unit, peak), vf_set(STEP));
    vf middle = vf_mul(vf_add(vf_mul(high, vf_set(0.5f)), vf_mul(low, vf_set(0.5f))), search->unit);
    for (int i = 0; i < GRID; i += TRIALS) {
        struct trial trials[TRIALS];
        for (int t = 0; t < TRIALS; t++) {
            float more = GRID_FIRST + (float)(i + t) * step;
            vf factor = vf_set((full + more) / full), side = vf_set((float)(t - 1) * (more * 0.5f));
            vf center = vf_add(vf_sub(vf_set(7.5f), vf_mul(middle, factor)), side);
            vf zero = vf_clamp(center, vf_set(0), vf_set(15));
            zero = vf_sub(vf_add(zero, vf_set(ROUNDING)), vf_set(ROUNDING));
            trials[t] = trial_of(vf_mul(whole, factor), search->symmetric ? vf_set(8) : zero);
        }
        try_all(search, trials);
    }
}

/* Tries, from the best so far, its scale with the zero point, one less and one more; symmetric: the other sign. */
INLINE void search_near(struct search *search) {
    static const float signs[TRIALS] = {-1, 1, 0.96875f}, moves[TRIALS] = {-1, 0, 1};
    for (int round = 0; round < ROUNDS; round++) {
        struct trial trials[TRIALS];
        vf steps = vf_mul(vf_inverse(search->scale), vf_set(32768.0f * STEP)), zero = search->zero;
        for (int t = 0; t < TRIALS; t++)
            trials[t] = search->symmetric
                            ? trial_of(vf_mul(steps, vf_set(signs[t])), zero)
                            : trial_of(steps, vf_clamp(vf_add(zero, vf_set(moves[t])), vf_set(0), vf_set(15)));
        try_all(search, trials);
    }
}

/* sum (x - scale d)^2, relative to the square of 1 / unit. */
INLINE vf error_left(const struct search *search, vf scale, vf zero) {
    const vf inverse = vf_inverse(scale), shift = vf_add(zero, vf_set(ROUNDING)), unit = search->unit;
    vf sum = vf_set(0);
    for (int i = 0; i < search->size; i++) {
        vf x = vf_load(&search->tile->x[i][search->first]);
        vf code = vf_clamp(vf_add(vf_mul(x, inverse), shift), vf_set(ROUNDING), vf_set(ROUNDING + 15));
        vf r = vf_mul(vf_sub(x, vf_mul(scale, vf_sub(code, shift))), unit);
        sum = vf_add(sum, vf_mul(r, r));
    }
    return sum;
}

/* Whether the result is better than `scale` and `zero` by more than the errors of these sums: of a term 2^-22 of a step
 * times its root, of an addition 2^-24 of the sum, and near a tie the code may be the other one. */
INLINE vm is_better(const struct search *search, vf found, vf scale, vf zero) {
    vf before = error_left(search, scale, zero), after = error_left(search, found, search->zero);
    vf step = vf_mul(found, search->unit), slack = vf_mul(vf_mul(step, step), vf_set((float)search->size * 0x1p-25f));
    vf most = vf_add(vf_mul(after, vf_set(1 + 0x1p-12f)), slack);
    vf size = vf_abs(found);
    vm storable = vm_and(vf_le(vf_set(FLT_MIN), size), vf_le(size, vf_set(FLT_MAX)));
    return vm_and(vm_and(vf_lt(most, before), vf_le(before, vf_set(FLT_MAX))), storable);
}

/* tile->scale and tile->zero are those of the rule without search; the search replaces them where it finds better ones.
 * `low` and `high` are the extremes, `unit` is the inverse of the scale that covers them; all [BLOCKS]. */
static void search_integers(struct et_nbits_tile *tile, const struct et_nbits_format *format, const float *low,
                            const float *high, const float *unit) {
    for (int first = 0; first < BLOCKS; first += LANES) {
        vf peak = vf_max(vf_load(high + first), vf_neg(vf_load(low + first)));
        vf before = vf_load(tile->scale + first), zero = vf_load(tile->zero + first), one = vf_set(1);
        vf factor = vf_div(vf_set(PEAK), vf_max(peak, vf_set(FLT_MIN)));
        vm sought = vf_le(factor, vf_set(FLT_MAX)); /* no search for a block that is zero, or nearly */
        struct search search = {tile,
                                first,
                                format->block_size,
                                format->symmetric,
                                format->half_scales,
                                vf_select(sought, vf_div(peak, vf_set(PEAK)), one),
                                vf_select(sought, vf_load(unit + first), vf_set(0)),
                                vf_set(0),
                                one,
                                zero};
        make_integers(tile, first, format->block_size, vf_select(sought, factor, vf_set(0)));
        search_grid(&search, vf_load(low + first), vf_load(high + first), peak);
        search_near(&search);
        vf found = vf_mul(search.scale, search.grain);
        if (format->half_scales) {
            float stored[LANES];
            vf_store(stored, found);
            for (int l = 0; l < LANES; l++)
                stored[l] = round_f16(stored[l]); /* only the last bit of the product may not fit */
            found = vf_load(stored);
        }
        vm better = is_better(&search, found, before, zero);
        vf_store(tile->scale + first, vf_select(better, found, before));
        vf_store(tile->zero + first, vf_select(better, search.zero, zero));
    }
}

#endif
