/* Conversions between f32 and the 16-bit floats, rounding to nearest even; every f16 pattern is tested against
 * numpy. */
#ifndef EDGETUNE_HALF_H
#define EDGETUNE_HALF_H

#include "edgetune.h"

#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

/* Without branches, so that the compiler can vectorize loops with it. */
static inline float float_of_f16(uint16_t half) {
    const float magic = float_of_bits((uint32_t)(254 - 15) << 23); /* 2^112, the ratio of the exponent biases */
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fff) << 13;
    float scaled = float_of_bits(rest) * magic; /* also right for denormals: the product is exact */
    uint32_t not_finite = rest >= 0x0f800000 ? 0x7f800000 | rest : 0;
    return float_of_bits(sign | bits_of_float(scaled) | not_finite);
}

/* A NaN becomes the quiet NaN of its sign, as in libggml. */
static inline uint16_t f16_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest < 0x38800000) /* below 2^-14, f16 has steps of 2^-24, as f32 has from 1/2 on */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000));
    uint32_t rebiased = rest - ((127 - 15) << 23);
    uint32_t rounded = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
    return (uint16_t)(sign | (rounded < 0x7c00 ? rounded : 0x7c00));
}

/* The nearest bf16 as f32; a NaN stays one. */
static inline float round_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    return float_of_bits((bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x00400000) & 0xffff0000 : rounded);
}

/* The nearest f16 as f32: infinity from 65520 up, denormals of f16 below 2^-14; a NaN stays one. Without branches. */
static inline float round_f16(float value) {
    uint32_t bits = bits_of_float(value), sign = bits & 0x80000000, size = bits & 0x7fffffff;
    uint32_t normal = (size + 0xfff + (size >> 13 & 1)) & 0xffffe000;
    normal = normal >= 0x47800000 ? 0x7f800000 : normal;
    uint32_t denormal = bits_of_float((float_of_bits(size) + 0.5f) - 0.5f); /* f32 has steps of 2^-24 there, as f16 */
    uint32_t rounded = size < 0x38800000 ? denormal : normal;
    return float_of_bits(sign | (size > 0x7f800000 ? size | 0x00400000 : rounded));
}

static inline float round_to(enum et_dtype dtype, float value) {
    return dtype == ET_F16 ? round_f16(value) : dtype == ET_BF16 ? round_bf16(value) : value;
}

/* Exact, also for denormals. */
static inline void et_widen(enum et_dtype dtype, const uint16_t *source /* [count] */, float *out, int64_t count) {
    if (dtype == ET_F16)
        for (int64_t i = 0; i < count; i++)
            out[i] = float_of_f16(source[i]);
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = float_of_bf16(source[i]);
}

#endif
