/* Eight lanes of AVX2. What each function does: simd_scalar.h. */
#ifndef EDGETUNE_SIMD_AVX2_H
#define EDGETUNE_SIMD_AVX2_H

#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 8, STREAMS = 2 };

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm; /* all bits of a lane set, or none */

static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline __m256i widened(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vf vf_load_bf16(const uint16_t *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(widened(p), 16)); }

static inline vf vf_load_f16(const uint16_t *p) { /* float_of_f16 of half.h; F16C is a separate feature */
    __m256i half = widened(p);
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(half, _mm256_set1_epi32(0x8000)), 16);
    __m256i rest = _mm256_slli_epi32(_mm256_and_si256(half, _mm256_set1_epi32(0x7fff)), 13);
    __m256 scaled = _mm256_mul_ps(_mm256_castsi256_ps(rest), _mm256_set1_ps(0x1p112f));
    __m256i not_finite = _mm256_and_si256(_mm256_cmpgt_epi32(rest, _mm256_set1_epi32(0x0f7fffff)),
                                          _mm256_or_si256(rest, _mm256_set1_epi32(0x7f800000)));
    return _mm256_or_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, not_finite)), scaled);
}

static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf vf_set(float a) { return _mm256_set1_ps(a); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_neg(vf a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }

static inline vm vm_and(vm a, vm b) { return _mm256_and_ps(a, b); }
static inline vm vm_or(vm a, vm b) { return _mm256_or_ps(a, b); }
static inline vm vm_all(void) { return _mm256_castsi256_ps(_mm256_set1_epi32(-1)); }
static inline vm vm_not(vm a) { return _mm256_xor_ps(a, vm_all()); }
static inline uint32_t vm_bits(vm a) { return (uint32_t)_mm256_movemask_ps(a); }

static inline vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void vi_store(int32_t *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline vi vi_set(int32_t a) { return _mm256_set1_epi32(a); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vi vi_shl(vi a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vi vi_shr(vi a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vm vi_eq(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
static inline vi vi_bits_of(vf a) { return _mm256_castps_si256(a); }
static inline vi vi_halves_mul(vi a, vi b) { return _mm256_mulhrs_epi16(a, b); }
static inline vi vi_halves_min(vi a, vi b) { return _mm256_min_epi16(a, b); }
static inline vi vi_halves_max(vi a, vi b) { return _mm256_max_epi16(a, b); }
static inline vi vi_halves_dot(vi a, vi b) { return _mm256_madd_epi16(a, b); }
static inline vf vf_of_vi(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vi vi_trunc(vf a) { return _mm256_cvttps_epi32(a); }

static inline vi vi_select(vm m, vi a, vi b) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(b), _mm256_castsi256_ps(a), m));
}
static inline bool vm_any(vm a) { return _mm256_movemask_ps(a) != 0; }

static inline vf vf_times_power(vf p, vf s) {
    return p * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(s), 23));
}

static inline __m256 look_up_8(__m256i codes, __m256 low, __m256 high) {
    __m256 from_low = _mm256_permutevar8x32_ps(low, codes), from_high = _mm256_permutevar8x32_ps(high, codes);
    return _mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28))); /* by bit 3 */
}

static inline void vf_expand_codes(const uint8_t *packed, const float *table /* [16] */, float *out /* [16] */) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)packed);
    __m128i codes = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);
    __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    _mm256_storeu_ps(out, look_up_8(_mm256_cvtepu8_epi32(codes), low, high));
    _mm256_storeu_ps(out + 8, look_up_8(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)), low, high));
}

/* 8 x 8: pairs and quads within 128 bits, then the two halves. */
static inline void transpose(const __m256i *in, __m256i *out) {
    __m256i pairs[8], quads[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(in[i], in[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
        out[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
    }
}

static inline void vf_transpose(const vf *in, vf *out) {
    __m256i bits[8], result[8];
#pragma GCC unroll 8
    for (int l = 0; l < 8; l++)
        bits[l] = _mm256_castps_si256(in[l]);
    transpose(bits, result);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        out[i] = _mm256_castsi256_ps(result[i]);
}

static inline void vi_transpose_store(const vi *words, int count, uint8_t *const *rows, int64_t offset) {
    __m256i in[8], result[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        in[i] = i < count ? words[i] : _mm256_setzero_si256();
    transpose(in, result);
    __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
#pragma GCC unroll 8
    for (int l = 0; l < 8; l++)
        _mm256_maskstore_epi32((int *)(rows[l] + offset), wanted, result[l]);
}

/* A binary search of the sixteen levels. Comparisons give -1 or 0, and a permutation uses the low three bits of its
 * index: -1 selects entry 7, -2 entry 6, and the tables are in that order. */
#include "iq4_levels.h"

struct iq4_halving {
    vi eighth; /* minus the number of even-numbered midpoints (of 1, 3, .. 13) that are not above a */
    vm upper;  /* the upper one of the two levels there */
};

static inline vf iq4_table(const float *table, vi negative) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), negative);
}

static inline vi iq4_not_below(vf a, vf midpoint) {
    return _mm256_castps_si256(_mm256_cmp_ps(a, midpoint, _CMP_NLT_UQ));
}

static inline struct iq4_halving iq4_halve(vf a) {
    static const float quarter[8] = {-57, 0, 0, 0, 0, 0, 0, 45.5f};           /* midpoints 3, 11 */
    static const float eighth[8] = {-93.5f, 0, 0, 0, 0, 79, 19, -28.5f};      /* 1, 5, 9, 13 */
    static const float last[8] = {-115.5f, 101, 61, 31.5f, 7, -16, -42, -74}; /* 0, 2, .. 14 */
    vi n = iq4_not_below(a, _mm256_set1_ps(-4.5f));
    n = _mm256_add_epi32(_mm256_add_epi32(n, n), iq4_not_below(a, iq4_table(quarter, n)));
    n = _mm256_add_epi32(_mm256_add_epi32(n, n), iq4_not_below(a, iq4_table(eighth, n)));
    return (struct iq4_halving){n, _mm256_cmp_ps(a, iq4_table(last, n), _CMP_NLT_UQ)};
}

static inline vf vf_iq4_nearest(vf a) {
    static const float even[8] = {-127, 89, 53, 25, 1, -22, -49, -83};
    static const float odd[8] = {-104, 113, 69, 38, 13, -10, -35, -65};
    struct iq4_halving h = iq4_halve(a);
    return _mm256_blendv_ps(iq4_table(even, h.eighth), iq4_table(odd, h.eighth), h.upper);
}

static inline vi vi_iq4_index(vf a) {
    struct iq4_halving h = iq4_halve(a);
    vi twice = _mm256_add_epi32(h.eighth, h.eighth);
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_add_epi32(twice, _mm256_castps_si256(h.upper)));
}

#endif
