/* The few vector operations that the row kernels need besides + - *, which GCC and Clang give to vector types as they
 * are. One set per instruction set; each is exactly one IEEE operation a lane, so that every set gives the same bits.
 *
 * They are spelled out because GCC 12 turns `a > b ? a : b` in a long loop body into branches and masks, at half the
 * speed.
 */
#ifndef EDGETUNE_COMPARE_VECTOR_H
#define EDGETUNE_COMPARE_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* floats: a vector; mask: what a comparison gives; WIDTH: floats in a vector, a divisor of 16.
 *
 *   larger(a, b)        a > b ? a : b, so b where one of them is NaN
 *   smaller(a, b)       a < b ? a : b
 *   choose(m, a, b)     m ? a : b
 *   some(m)             whether m holds in a lane
 *   raised(p, s)        p * 2^n for s = n + 127 + 1.5 * 2^23: the low bits of s become the exponent of a factor
 */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
typedef __m512 floats;
typedef __mmask16 mask;
static inline floats load(const float *p) { return _mm512_loadu_ps(p); }
static inline floats all(float x) { return _mm512_set1_ps(x); }
static inline floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
static inline floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }
static inline mask less(floats a, floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline floats choose(mask m, floats a, floats b) { return _mm512_mask_blend_ps(m, b, a); }
static inline int some(mask m) { return m != 0; }
static inline floats raised(floats p, floats s) {
    return p * _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(s), 23));
}
#elif defined(__AVX2__)
enum { WIDTH = 8 };
typedef __m256 floats;
typedef __m256 mask;
static inline floats load(const float *p) { return _mm256_loadu_ps(p); }
static inline floats all(float x) { return _mm256_set1_ps(x); }
static inline floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
static inline floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }
static inline mask less(floats a, floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline floats choose(mask m, floats a, floats b) { return _mm256_blendv_ps(b, a, m); }
static inline int some(mask m) { return _mm256_movemask_ps(m) != 0; }
static inline floats raised(floats p, floats s) {
    return p * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(s), 23));
}
#elif defined(__x86_64__)
enum { WIDTH = 4 };
typedef __m128 floats;
typedef __m128 mask;
static inline floats load(const float *p) { return _mm_loadu_ps(p); }
static inline floats all(float x) { return _mm_set1_ps(x); }
static inline floats larger(floats a, floats b) { return _mm_max_ps(a, b); }
static inline floats smaller(floats a, floats b) { return _mm_min_ps(a, b); }
static inline mask less(floats a, floats b) { return _mm_cmplt_ps(a, b); }
static inline floats choose(mask m, floats a, floats b) { return _mm_or_ps(_mm_and_ps(m, a), _mm_andnot_ps(m, b)); }
static inline int some(mask m) { return _mm_movemask_ps(m) != 0; }
static inline floats raised(floats p, floats s) {
    return p * _mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(s), 23));
}
#elif defined(__aarch64__)
enum { WIDTH = 4 };
typedef float32x4_t floats;
typedef uint32x4_t mask;
static inline floats load(const float *p) { return vld1q_f32(p); }
static inline floats all(float x) { return vdupq_n_f32(x); }
static inline floats larger(floats a, floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline floats smaller(floats a, floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline mask less(floats a, floats b) { return vcltq_f32(a, b); }
static inline floats choose(mask m, floats a, floats b) { return vbslq_f32(m, a, b); }
static inline int some(mask m) { return vmaxvq_u32(m) != 0; }
static inline floats raised(floats p, floats s) {
    return p * vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(s), 23));
}
#else
enum { WIDTH = 1 };
typedef float floats;
typedef int mask;
static inline floats load(const float *p) { return *p; }
static inline floats all(float x) { return x; }
static inline floats larger(floats a, floats b) { return a > b ? a : b; }
static inline floats smaller(floats a, floats b) { return a < b ? a : b; }
static inline mask less(floats a, floats b) { return a < b; }
static inline floats choose(mask m, floats a, floats b) { return m ? a : b; }
static inline int some(mask m) { return m; }
static inline floats raised(floats p, floats s) {
    uint32_t bits;
    memcpy(&bits, &s, sizeof bits);
    bits <<= 23;
    float factor;
    memcpy(&factor, &bits, sizeof factor);
    return p * factor;
}
#endif

#endif
