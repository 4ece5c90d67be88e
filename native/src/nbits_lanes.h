/* Loading and storing a tile, LANES blocks at a time, one per lane: rows to columns, and codes to packed rows. */
#ifndef EDGETUNE_NBITS_LANES_H
#define EDGETUNE_NBITS_LANES_H

#include "nbits_kernel.h"
#include "simd.h"

#include <float.h>

enum { BLOCKS = ET_NBITS_BLOCKS };

INLINE vf vf_clamp(vf x, vf low, vf high) { return vf_min(vf_max(x, low), high); }

/* tile->x and tile->not_finite, and the smallest and largest value of each block, 0 included. */
INLINE void load_as(struct et_nbits_tile *tile, enum et_dtype dtype, int size, float *low, float *high) {
    tile->not_finite = 0;
    for (int first = 0; first < BLOCKS; first += LANES) {
        vf smallest = vf_set(0), largest = vf_set(0);
        vm finite = vm_all();
        for (int i = 0; i < size; i += LANES) {
            vf rows[LANES], columns[LANES];
            for (int l = 0; l < LANES; l++)
                rows[l] = vf_load_as(dtype, tile->from[first + l], i);
            vf_transpose(rows, columns);
            for (int j = 0; j < LANES; j++) {
                vf_store(&tile->x[i + j][first], columns[j]);
                smallest = vf_min(columns[j], smallest);
                largest = vf_max(columns[j], largest);
                finite = vm_and(finite, vf_le(vf_abs(columns[j]), vf_set(FLT_MAX)));
            }
        }
        vf_store(low + first, smallest);
        vf_store(high + first, largest);
        tile->not_finite |= vm_bits(vm_not(finite)) << first;
    }
}

static void load_tile(struct et_nbits_tile *tile, enum et_dtype dtype, int size, float *low /* [BLOCKS] */,
                      float *high /* [BLOCKS] */) {
    if (dtype == ET_F32)
        load_as(tile, ET_F32, size, low, high);
    else if (dtype == ET_F16)
        load_as(tile, ET_F16, size, low, high);
    else
        load_as(tile, ET_BF16, size, low, high);
}

INLINE vf vf_inverse(vf scale) {
    vm none = vf_eq(scale, vf_set(0));
    return vf_select(none, vf_set(0), vf_div(vf_set(1), vf_select(none, vf_set(1), scale)));
}

/* Half away from zero, as roundf, for 0 <= x < 2^22. The difference is exact, so ties are detected. */
INLINE vf vf_round_half_up(vf x) {
    vf even = vf_sub(vf_add(x, vf_set(ROUNDING)), vf_set(ROUNDING));
    return vf_select(vf_eq(vf_sub(x, even), vf_set(0.5f)), vf_add(even, vf_set(1)), even);
}

/* Computes the codes for the scales and zero points of the tile, and stores them. */
INLINE void encode_bits(const struct et_nbits_tile *tile, int size, int bits) {
    const int in_word = 32 / bits, words = size / in_word;
    const vf top = vf_set((float)((1 << bits) - 1));
    for (int first = 0; first < BLOCKS; first += LANES) {
        vf inverse = vf_inverse(vf_load(tile->scale + first)), zero = vf_load(tile->zero + first);
        for (int begin = 0; begin < words; begin += LANES) {
            vi word[LANES];
            int count = words - begin < LANES ? words - begin : LANES;
            for (int n = 0; n < count; n++) {
                word[n] = vi_set(0);
#pragma GCC unroll 8
                for (int j = 0; j < in_word; j++) {
                    vf x = vf_load(&tile->x[(begin + n) * in_word + j][first]);
                    vf code = vf_clamp(vf_add(vf_mul(x, inverse), zero), vf_set(0), top);
                    word[n] = vi_or(word[n], vi_shl(vi_trunc(vf_round_half_up(code)), j * bits));
                }
            }
            vi_transpose_store(word, count, tile->to + first, 4 * begin);
        }
    }
}

static void encode(const struct et_nbits_tile *tile, int size, int bits) {
    if (bits == 4)
        encode_bits(tile, size, 4);
    else
        encode_bits(tile, size, 8);
}

#endif
