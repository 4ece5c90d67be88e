/* Sixteen lanes of AVX-512 (F, BW, DQ, VL). What each function does: simd_scalar.h. */
#ifndef EDGETUNE_SIMD_AVX512_H
#define EDGETUNE_SIMD_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, STREAMS = 4 };

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }

static inline vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline vf vf_set(float a) { return _mm512_set1_ps(a); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }

static inline vm vm_and(vm a, vm b) { return a & b; }
static inline vm vm_or(vm a, vm b) { return a | b; }
static inline vm vm_not(vm a) { return (vm)~a; }
static inline vm vm_all(void) { return 0xffff; }
static inline uint32_t vm_bits(vm a) { return a; }

static inline vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
static inline void vi_store(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }
static inline vi vi_set(int32_t a) { return _mm512_set1_epi32(a); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vi vi_shl(vi a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vi vi_shr(vi a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vm vi_eq(vi a, vi b) { return _mm512_cmpeq_epi32_mask(a, b); }
static inline vi vi_select(vm m, vi a, vi b) { return _mm512_mask_blend_epi32(m, b, a); }
static inline vf vf_of_vi(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi vi_trunc(vf a) { return _mm512_cvttps_epi32(a); }
static inline vi vi_bits_of(vf a) { return _mm512_castps_si512(a); }
static inline vi vi_halves_mul(vi a, vi b) { return _mm512_mulhrs_epi16(a, b); }
static inline vi vi_halves_min(vi a, vi b) { return _mm512_min_epi16(a, b); }
static inline vi vi_halves_max(vi a, vi b) { return _mm512_max_epi16(a, b); }
static inline vi vi_halves_dot(vi a, vi b) { return _mm512_madd_epi16(a, b); }

static inline vf vf_times_power(vf p, vf s) {
    return p * _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(s), 23));
}

static inline void vf_expand_codes(const uint8_t *packed, const float *table /* [16] */, float *out /* [16] */) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)packed);
    __m128i codes = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes); /* the permutation reads the low 4 bits only */
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), _mm512_loadu_ps(table)));
}

/* 16 x 16 in four steps: pairs and quads within 128 bits, then the 128-bit quarters. */
static inline void transpose(const __m512i *in, __m512i *out) {
    __m512i pairs[16], quads[16], halves[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        halves[i] = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88);
        halves[i + 4] = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
        halves[i + 8] = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
        halves[i + 12] = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        out[i] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0xdd);
        out[i + 4] = _mm512_shuffle_i32x4(halves[i + 4], halves[i + 12], 0x88);
        out[i + 12] = _mm512_shuffle_i32x4(halves[i + 4], halves[i + 12], 0xdd);
    }
}
static inline bool vm_any(vm a) { return a != 0; }

static inline void vf_transpose(const vf *in, vf *out) {
    __m512i bits[16], result[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++)
        bits[l] = _mm512_castps_si512(in[l]);
    transpose(bits, result);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        out[i] = _mm512_castsi512_ps(result[i]);
}

static inline void vi_transpose_store(const vi *words, int count, uint8_t *const *rows, int64_t offset) {
    __m512i in[16], result[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        in[i] = i < count ? words[i] : _mm512_setzero_si512();
    transpose(in, result);
    __mmask16 wanted = (__mmask16)((1u << count) - 1);
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++)
        _mm512_mask_storeu_epi32(rows[l] + offset, wanted, result[l]);
}

/* Cells of width 8.75 around multiples of it: 31 of them cover all values, each has at most one midpoint, and no border
 * of a cell is near one. Adding 1.5 * 2^23 leaves the index of the cell in the low bits, of which the permutation uses
 * five. So one lookup finds the midpoint, and one comparison chooses between the levels below and above it. */
#include "iq4_cells.h"
#include "iq4_levels.h"

static inline vi iq4_cell(vf a) {
    return _mm512_castps_si512(_mm512_fmadd_ps(a, _mm512_set1_ps(1.0f / 8.75f), _mm512_set1_ps(12582912.0f)));
}

static inline vf iq4_look_up(const float *table, vi cell) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), cell, _mm512_loadu_ps(table + 16));
}

static inline vf vf_iq4_nearest(vf a) {
    vi cell = iq4_cell(a);
    vm above = _mm512_cmp_ps_mask(a, iq4_look_up(IQ4_CELL_MIDPOINT, cell), _CMP_NLT_UQ);
    return _mm512_mask_blend_ps(above, iq4_look_up(IQ4_CELL_BELOW, cell), iq4_look_up(IQ4_CELL_ABOVE, cell));
}

static inline vi vi_iq4_index(vf a) {
    vf b = vf_max(vf_min(a, vf_set(134.0f)), vf_set(-134.0f)); /* a NaN becomes 134 */
    vi cell = iq4_cell(b);
    vm above = _mm512_cmp_ps_mask(b, iq4_look_up(IQ4_CELL_MIDPOINT, cell), _CMP_NLT_UQ);
    vi below = _mm512_cvtps_epi32(iq4_look_up(IQ4_CELL_INDEX, cell));
    return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
}

#endif
