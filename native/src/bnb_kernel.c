/* The inner loops of bnb_*.c, compiled once for each instruction set (see dispatch.h). Every element is computed by
 * itself, so the results are the same bits everywhere.
 */
#include "bnb_kernel.h"

#include "dispatch.h"
#include "half.h"
#include "simd.h"

static void widen(const uint16_t *source, enum et_dtype dtype, float *out, int64_t count) {
    if (dtype == ET_F16)
        for (int64_t i = 0; i < count; i++)
            out[i] = float_of_f16(source[i]);
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = float_of_bf16(source[i]);
}

/* Floats without sign are ordered as their bits, infinity and NaN last, so integers are compared. */
static uint32_t absmax(const float *x, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t size = (int32_t)(bits_of_float(x[i]) & 0x7fffffff);
        largest = size > largest ? size : largest;
    }
    return (uint32_t)largest;
}

/* --- to codes ----------------------------------------------------------------------------------------------------- */

enum { TILE = 64 };

#if defined(__AVX512F__)

/* The rank of a value is the number of bounds below it, found by binary search: bound 7, then 3 or 11, and so on. Table
 * `next<s>` holds the bounds shifted by s, so that the rank so far is the index of the next bound to compare with. */
struct search {
    __m512 next3, next1, next0, middle;
    __m512i codes;
};

static inline struct search prepare(const struct et_four_bit *type) {
    const float *bounds = type->bounds; /* loads read up to index 19; those past 14 are never compared */
    return (struct search){_mm512_loadu_ps(bounds + 3), _mm512_loadu_ps(bounds + 1), _mm512_loadu_ps(bounds),
                           _mm512_set1_ps(bounds[7]), _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)type->codes))};
}

static inline __m512i above(__m512i rank, __m512 value, __m512 table, int more) {
    __mmask16 is_above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(rank, table), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(rank, is_above, rank, _mm512_set1_epi32(more));
}

static inline void encode_tile(const float *x, float factor, const struct et_four_bit *type, uint8_t *packed) {
    const struct search search = prepare(type);
    for (int i = 0; i < TILE; i += 16) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor));
        __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(value, search.middle, _CMP_GT_OQ), 8);
        rank = above(rank, value, search.next3, 4);
        rank = above(rank, value, search.next1, 2);
        rank = above(rank, value, search.next0, 1);
        __m128i codes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(rank, search.codes));
        __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110)); /* 16 * even + odd */
        _mm_storel_epi64((__m128i *)(packed + i / 2), _mm_cvtepi16_epi8(pairs));
    }
}

#else

/* The rank of a value is the number of bounds below it: one comparison and one addition per bound, no branch. */
static inline void rank_tile(const float *x, float factor, const float *bounds /* [15] */, uint8_t *rank /* [TILE] */) {
    int32_t count[TILE];
    for (int i = 0; i < TILE; i++) {
        float value = x[i] * factor;
        int32_t below = 0;
        for (int r = 0; r < 15; r++)
            below += value > bounds[r];
        count[i] = below;
    }
    for (int i = 0; i < TILE; i++)
        rank[i] = (uint8_t)count[i];
}

static inline void encode_tile(const float *x, float factor, const struct et_four_bit *type, uint8_t *packed) {
    uint8_t code[TILE];
    rank_tile(x, factor, type->bounds, code);
    if (!type->ascending)
        for (int i = 0; i < TILE; i++)
            code[i] = type->codes[code[i]];
    for (int i = 0; i < TILE / 2; i++)
        packed[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
}

#endif

static void encode(const float *x, int64_t count, float factor, const struct et_four_bit *type, uint8_t *packed) {
    int64_t i = 0;
    for (; i + TILE <= count; i += TILE)
        encode_tile(x + i, factor, type, packed + i / 2);
    if (i < count) { /* the rest, padded with zeros, as bitsandbytes pads an odd count */
        float rest[TILE] = {0};
        uint8_t bytes[TILE / 2];
        memcpy(rest, x + i, (size_t)(count - i) * sizeof *x);
        encode_tile(rest, factor, type, bytes);
        memcpy(packed + i / 2, bytes, (size_t)(count - i + 1) / 2);
    }
}

/* --- from codes --------------------------------------------------------------------------------------------------- */

static void expand(const uint8_t *packed, int64_t count, const float *table /* [16] */, float *out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        vf_expand_codes(packed + i / 2, table, out + i);
    for (; i < count; i++)
        out[i] = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

/* --- int8 --------------------------------------------------------------------------------------------------------- */

/* Two products in f32, each rounded, and 1/127 rounded to f32: not a division, and not scale/127 once per row. */
static inline float scaled(int8_t code, float scale) { return (float)code * scale * 7.874015718698502e-3f; }

static void scale_int8(const int8_t *codes, int64_t count, float scale, enum et_dtype dtype, float *out) {
    if (dtype == ET_F32)
        for (int64_t i = 0; i < count; i++)
            out[i] = scaled(codes[i], scale);
    else if (dtype == ET_F16)
        for (int64_t i = 0; i < count; i++)
            out[i] = round_f16(scaled(codes[i], scale));
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = round_bf16(scaled(codes[i], scale));
}

const struct et_bnb_kernels ET_KERNELS(bnb) = {widen, absmax, encode, expand, scale_int8};
