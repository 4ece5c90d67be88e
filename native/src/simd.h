/* The SIMD vocabulary of the instruction set that a kernel is compiled for (ET_ISA, see dispatch.h): vectors of LANES
 * floats or integers, the same functions for each instruction set. simd_scalar.h says what each function does.
 *
 * + - * work on vf as they are: GCC and Clang give them to vector types.
 */
#ifndef EDGETUNE_SIMD_H
#define EDGETUNE_SIMD_H

#include "edgetune.h"

#define ET_QUOTE(text) #text
#define ET_SIMD_HEADER(isa) ET_QUOTE(simd_##isa.h)
#define ET_SIMD_HEADER_OF(isa) ET_SIMD_HEADER(isa)
#include ET_SIMD_HEADER_OF(ET_ISA)

#define INLINE static inline __attribute__((always_inline))

/* 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even, and leaves the integer in the low bits. */
#define ROUNDING 12582912.0f

/* LANES weights of an element type, from `element` of a row on, as floats. */
INLINE vf vf_load_as(enum et_dtype dtype, const void *row, int64_t element) {
    if (dtype == ET_F32)
        return vf_load((const float *)row + element);
    const uint16_t *halves = (const uint16_t *)row + element;
    return dtype == ET_F16 ? vf_load_f16(halves) : vf_load_bf16(halves);
}

#endif
