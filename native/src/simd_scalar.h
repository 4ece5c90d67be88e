/* One lane of plain C: the definition of each function, which the vectors of the other simd_*.h must equal bit for
 * bit. */
#ifndef EDGETUNE_SIMD_SCALAR_H
#define EDGETUNE_SIMD_SCALAR_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

enum {
    LANES = 1,  /* floats in a vector */
    STREAMS = 2 /* independent sums to interleave, so that none waits for the latency of its own addition */
};

typedef float vf;    /* LANES floats */
typedef uint32_t vi; /* LANES integers of 32 bits; signed where a function says so */
typedef bool vm;     /* LANES truth values */

static inline vf vf_load(const float *p) { return *p; }
static inline vf vf_load_f16(const uint16_t *p) { return float_of_f16(*p); }
static inline vf vf_load_bf16(const uint16_t *p) { return float_of_bf16(*p); }
static inline void vf_store(float *p, vf a) { *p = a; }
static inline vf vf_set(float a) { return a; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_fma(vf a, vf b, vf c) { return fmaf(a, b, c); } /* a b + c, rounded once */
static inline vf vf_sqrt(vf a) { return sqrtf(a); }
static inline vf vf_abs(vf a) { return fabsf(a); }
static inline vf vf_neg(vf a) { return -a; }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; } /* b where one is NaN */
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; } /* b where one is NaN */
static inline vm vf_lt(vf a, vf b) { return a < b; }
static inline vm vf_le(vf a, vf b) { return a <= b; }
static inline vm vf_eq(vf a, vf b) { return a == b; }
static inline vf vf_select(vm m, vf a, vf b) { return m ? a : b; }

static inline vm vm_and(vm a, vm b) { return a && b; }
static inline vm vm_or(vm a, vm b) { return a || b; }
static inline vm vm_not(vm a) { return !a; }
static inline vm vm_all(void) { return true; }
static inline uint32_t vm_bits(vm a) { return a; } /* bit l: lane l */

static inline vi vi_load(const int32_t *p) { return (uint32_t)*p; }
static inline void vi_store(int32_t *p, vi a) { *p = (int32_t)a; }
static inline vi vi_set(int32_t a) { return (uint32_t)a; }
static inline vi vi_add(vi a, vi b) { return a + b; }
static inline vi vi_sub(vi a, vi b) { return a - b; }
static inline vi vi_and(vi a, vi b) { return a & b; }
static inline vi vi_or(vi a, vi b) { return a | b; }
static inline vi vi_min(vi a, vi b) { return (int32_t)a < (int32_t)b ? a : b; } /* signed */
static inline vi vi_max(vi a, vi b) { return (int32_t)a > (int32_t)b ? a : b; } /* signed */
static inline vi vi_shl(vi a, int n) { return a << n; }
static inline vi vi_shr(vi a, int n) { return a >> n; } /* zeros are shifted in */
static inline vm vi_eq(vi a, vi b) { return a == b; }
static inline vi vi_select(vm m, vi a, vi b) { return m ? a : b; }
static inline vf vf_of_vi(vi a) { return (float)(int32_t)a; }    /* by value */
static inline vi vi_trunc(vf a) { return (uint32_t)(int32_t)a; } /* towards zero; the result must fit */

/* A word as two separate numbers of 16 bits. */
static inline int32_t vi_half(vi a, int n) { return (int16_t)(a >> 16 * n); }
static inline vi vi_of_halves(int32_t low, int32_t high) { return ((uint32_t)low & 0xffff) | (uint32_t)high << 16; }

/* a b / 2^15, half up; not both are -2^15. */
static inline vi vi_halves_mul(vi a, vi b) {
    int32_t low = vi_half(a, 0) * vi_half(b, 0) + (1 << 14), high = vi_half(a, 1) * vi_half(b, 1) + (1 << 14);
    return vi_of_halves(low >> 15, high >> 15);
}
static inline bool vm_any(vm a) { return a; }

static inline vi vi_halves_min(vi a, vi b) {
    int32_t low = vi_half(a, 0) < vi_half(b, 0) ? vi_half(a, 0) : vi_half(b, 0);
    int32_t high = vi_half(a, 1) < vi_half(b, 1) ? vi_half(a, 1) : vi_half(b, 1);
    return vi_of_halves(low, high);
}

static inline vi vi_halves_max(vi a, vi b) {
    int32_t low = vi_half(a, 0) > vi_half(b, 0) ? vi_half(a, 0) : vi_half(b, 0);
    int32_t high = vi_half(a, 1) > vi_half(b, 1) ? vi_half(a, 1) : vi_half(b, 1);
    return vi_of_halves(low, high);
}

/* The sum of both products, of 32 bits. */
static inline vi vi_halves_dot(vi a, vi b) {
    return (uint32_t)(vi_half(a, 0) * vi_half(b, 0)) + (uint32_t)(vi_half(a, 1) * vi_half(b, 1));
}

static inline vi vi_bits_of(vf a) { /* by representation */
    vi b;
    memcpy(&b, &a, sizeof b);
    return b;
}

/* p * 2^n for s = n + 127 + 1.5 * 2^23: the low bits of s become the exponent of a factor. */
static inline vf vf_times_power(vf p, vf s) { return p * float_of_bits(bits_of_float(s) << 23); }

/* 8 bytes -> 16 values: out[2 i] = table[high half of packed[i]], out[2 i + 1] = table[low half]. */
static inline void vf_expand_codes(const uint8_t *packed, const float *table /* [16] */, float *out /* [16] */) {
    for (int i = 0; i < 8; i++) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
    }
}

/* out[i] lane l = in[l] lane i. */
static inline void vf_transpose(const vf *in /* [LANES] */, vf *out /* [LANES] */) { out[0] = in[0]; }

/* Stores lane l of words[i] at rows[l] + offset + 4 i, for the first `count` of the LANES words. */
static inline void vi_transpose_store(const vi *words, int count, uint8_t *const *rows, int64_t offset) {
    if (count)
        memcpy(rows[0] + offset, words, sizeof *words);
}

/* The level of IQ4 nearest to a: one of IQ4_VALUES. At a midpoint the upper one; the highest for a NaN. */
#include "iq4_levels.h"

static inline vi vi_iq4_index(vf a) { /* its index, 0 to 15 */
    uint32_t index = 0;
    for (int i = 0; i < 15; i++)
        index += (uint32_t)!(a < IQ4_MIDPOINTS[i]);
    return index;
}

static inline vf vf_iq4_nearest(vf a) { return IQ4_VALUES[vi_iq4_index(a)]; }

#endif
