/* Four lanes of NEON on AArch64. What each function does: simd_scalar.h. */
#ifndef EDGETUNE_SIMD_NEON_H
#define EDGETUNE_SIMD_NEON_H

#include <arm_neon.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 4, STREAMS = 4 };

typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint32x4_t vm; /* all bits of a lane set, or none */

static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vf vf_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline void vf_store(float *p, vf a) { vst1q_f32(p, a); }
static inline vf vf_set(float a) { return vdupq_n_f32(a); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_sqrt(vf a) { return vsqrtq_f32(a); }
static inline vf vf_abs(vf a) { return vabsq_f32(a); }
static inline vf vf_neg(vf a) { return vnegq_f32(a); }
static inline vf vf_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); } /* FMIN has other rules for NaN */
static inline vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vm vf_lt(vf a, vf b) { return vcltq_f32(a, b); }
static inline vm vf_le(vf a, vf b) { return vcleq_f32(a, b); }
static inline vm vf_eq(vf a, vf b) { return vceqq_f32(a, b); }
static inline vf vf_select(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }

static inline vm vm_and(vm a, vm b) { return vandq_u32(a, b); }
static inline vm vm_or(vm a, vm b) { return vorrq_u32(a, b); }
static inline vm vm_not(vm a) { return vmvnq_u32(a); }
static inline vm vm_all(void) { return vdupq_n_u32(UINT32_MAX); }

static inline uint32_t vm_bits(vm a) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(a, vld1q_u32(weights)));
}
static inline bool vm_any(vm a) { return vmaxvq_u32(a) != 0; }

static inline vi vi_load(const int32_t *p) { return vld1q_s32(p); }
static inline void vi_store(int32_t *p, vi a) { vst1q_s32(p, a); }
static inline vi vi_set(int32_t a) { return vdupq_n_s32(a); }
static inline vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
static inline vi vi_sub(vi a, vi b) { return vsubq_s32(a, b); }
static inline vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
static inline vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
static inline vi vi_min(vi a, vi b) { return vminq_s32(a, b); }
static inline vi vi_max(vi a, vi b) { return vmaxq_s32(a, b); }
static inline vi vi_shl(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
static inline vi vi_shr(vi a, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n)));
}
static inline vm vi_eq(vi a, vi b) { return vceqq_s32(a, b); }
static inline vi vi_select(vm m, vi a, vi b) { return vbslq_s32(m, a, b); }
static inline vf vf_of_vi(vi a) { return vcvtq_f32_s32(a); }
static inline vi vi_trunc(vf a) { return vcvtq_s32_f32(a); }
static inline vi vi_bits_of(vf a) { return vreinterpretq_s32_f32(a); }

#define HALVES vreinterpretq_s16_s32
static inline vi vi_halves_mul(vi a, vi b) { return vreinterpretq_s32_s16(vqrdmulhq_s16(HALVES(a), HALVES(b))); }
static inline vi vi_halves_min(vi a, vi b) { return vreinterpretq_s32_s16(vminq_s16(HALVES(a), HALVES(b))); }
static inline vi vi_halves_max(vi a, vi b) { return vreinterpretq_s32_s16(vmaxq_s16(HALVES(a), HALVES(b))); }

static inline vi vi_halves_dot(vi a, vi b) {
    vi low = vmull_s16(vget_low_s16(HALVES(a)), vget_low_s16(HALVES(b)));
    return vpaddq_s32(low, vmull_high_s16(HALVES(a), HALVES(b)));
}

static inline vf vf_times_power(vf p, vf s) {
    return p * vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(s), 23));
}

/* Four values: the code in each 32-bit lane becomes the indices of the four bytes of its value. */
static inline void look_up_4(uint32x4_t codes, uint8x16x4_t table, float *out /* [4] */) {
    uint32x4_t indices = vmlaq_u32(vdupq_n_u32(0x03020100), codes, vdupq_n_u32(0x04040404));
    vst1q_u8((uint8_t *)out, vqtbl4q_u8(table, vreinterpretq_u8_u32(indices)));
}

static inline void vf_expand_codes(const uint8_t *packed, const float *table /* [16] */, float *out /* [16] */) {
    const uint8_t *bytes_of_table = (const uint8_t *)table;
    uint8x16x4_t wide = {{vld1q_u8(bytes_of_table), vld1q_u8(bytes_of_table + 16), vld1q_u8(bytes_of_table + 32),
                          vld1q_u8(bytes_of_table + 48)}};
    uint8x8_t bytes = vld1_u8(packed);
    uint8x8x2_t codes = vzip_u8(vshr_n_u8(bytes, 4), vand_u8(bytes, vdup_n_u8(15)));
    for (int half = 0; half < 2; half++) {
        uint16x8_t shorts = vmovl_u8(codes.val[half]);
        look_up_4(vmovl_u16(vget_low_u16(shorts)), wide, out + 8 * half);
        look_up_4(vmovl_u16(vget_high_u16(shorts)), wide, out + 8 * half + 4);
    }
}

static inline void vf_transpose(const vf *in, vf *out) {
    vf ab_low = vzip1q_f32(in[0], in[2]), ab_high = vzip2q_f32(in[0], in[2]);
    vf cd_low = vzip1q_f32(in[1], in[3]), cd_high = vzip2q_f32(in[1], in[3]);
    out[0] = vzip1q_f32(ab_low, cd_low);
    out[1] = vzip2q_f32(ab_low, cd_low);
    out[2] = vzip1q_f32(ab_high, cd_high);
    out[3] = vzip2q_f32(ab_high, cd_high);
}

static inline void vi_transpose_store(const vi *words, int count, uint8_t *const *rows, int64_t offset) {
    vf in[4], result[4];
    for (int i = 0; i < 4; i++)
        in[i] = vreinterpretq_f32_s32(i < count ? words[i] : vdupq_n_s32(0));
    vf_transpose(in, result);
    for (int l = 0; l < 4; l++)
        memcpy(rows[l] + offset, &result[l], (size_t)count * 4);
}

/* A binary search; a table of sixteen floats is looked up as 64 bytes. */
#include "iq4_levels.h"

static inline vf iq4_table(const float *table /* [16] */, vi index) {
    uint8x16x4_t bytes;
    for (int i = 0; i < 4; i++)
        bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(table + 4 * i));
    vi first = vaddq_s32(vmulq_s32(index, vdupq_n_s32(0x04040404)), vdupq_n_s32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32(first)));
}

static inline vi vi_iq4_index(vf a) {
    static const float midpoints[16] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                        7,       19,     31.5f, 45.5f, 61,  79,     101, INFINITY};
    vi index = vdupq_n_s32(0); /* the number of midpoints known to be not above a */
    for (int step = 8; step > 0; step /= 2) {
        vf midpoint = iq4_table(midpoints, vaddq_s32(index, vdupq_n_s32(step - 1)));
        vm above = vmvnq_u32(vcltq_f32(a, midpoint));
        index = vaddq_s32(index, vandq_s32(vreinterpretq_s32_u32(above), vdupq_n_s32(step)));
    }
    return index;
}

static inline vf vf_iq4_nearest(vf a) { return iq4_table(IQ4_VALUES, vi_iq4_index(a)); }

#endif
