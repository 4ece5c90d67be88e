/* Four lanes of SSE2, which every x86-64 has: the part of the vocabulary that compare_kernel.c uses. What each function
 * does: simd_scalar.h. */
#ifndef EDGETUNE_SIMD_SSE2_H
#define EDGETUNE_SIMD_SSE2_H

#include <emmintrin.h>
#include <stdbool.h>

enum { LANES = 4 };

typedef __m128 vf;
typedef __m128 vm; /* all bits of a lane set, or none */

static inline vf vf_load(const float *p) { return _mm_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm_storeu_ps(p, a); }
static inline vf vf_set(float a) { return _mm_set1_ps(a); }
static inline vf vf_min(vf a, vf b) { return _mm_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm_max_ps(a, b); }
static inline vm vf_lt(vf a, vf b) { return _mm_cmplt_ps(a, b); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm_or_ps(_mm_and_ps(m, a), _mm_andnot_ps(m, b)); }
static inline bool vm_any(vm a) { return _mm_movemask_ps(a) != 0; }
static inline vf vf_times_power(vf p, vf s) { return p * _mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(s), 23)); }

#endif
