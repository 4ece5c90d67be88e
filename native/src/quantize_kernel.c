/* The quantizers of the GGUF types, compiled once for each instruction set (see dispatch.h). The formats themselves are
 * in quantize_k.h (super-blocks of 256), quantize_iq4.h and quantize_32.h (blocks of 32). */
#include "quantize_kernel.h"

#include "dispatch.h"
#include "ggml_abi.h"
#include "half.h"
#include "quantize_search.h"
#include "simd.h"

enum {
    BLOCK = 32,            /* weights of a block of the older types */
    SUPER = 256,           /* weights of a super-block */
    MAX_SUBS = 16,         /* sub-blocks in it */
    WIDE = LANES * STREAMS /* blocks of 32 at once */
};

typedef float lane_floats[LANES];

#define LOAD_LANES(type, load)                                                                                         \
    for (int i = 0; i < n; i += LANES) {                                                                               \
        vf in[LANES];                                                                                                  \
        for (int l = 0; l < LANES; l++)                                                                                \
            in[l] = load((const type *)rows[l] + i);                                                                   \
        vf_transpose(in, out + i);                                                                                     \
    }                                                                                                                  \
    break;

/* Lane l of out[i] is rows[l][i]. */
static void load_lanes(const void *const *rows, enum et_dtype dtype, int n, vf *out) {
    switch (dtype) {
    case ET_F32:
        LOAD_LANES(float, vf_load)
    case ET_F16:
        LOAD_LANES(uint16_t, vf_load_f16)
    case ET_BF16:
        LOAD_LANES(uint16_t, vf_load_bf16)
    }
}

INLINE void load_x(const struct et_group *group, int first, int n, vf *out) {
    load_lanes(group->x + first, group->dtype, n, out);
}

INLINE void load_w(const struct et_group *group, int first, int n, vf *out) {
    load_lanes(group->w + first, ET_F32, n, out);
}

/* Row l + offset gets lane l of each of the words. */
INLINE void store_words(const vi *words, int count, uint8_t *const *rows, int64_t offset) {
    for (int i = 0; i < count; i += LANES)
        vi_transpose_store(words + i, count - i < LANES ? count - i : LANES, rows, offset + 4 * i);
}

/* Lanes whose values are all finite and not too large. */
INLINE vm are_proven(const vf *x, int n) {
    vm proven = vm_all();
    for (int i = 0; i < n; i++)
        proven = vm_and(proven, vf_le(vf_abs(x[i]), vf_set(PROVEN_MAX)));
    return proven;
}

INLINE uint64_t lanes_not(vm proven) { return vm_bits(vm_not(proven)); }

INLINE vf sum_of_squares(const vf *x, int n) {
    vf sum = vf_set(0);
    for (int i = 0; i < n; i++)
        sum = vf_add(sum, vf_mul(x[i], x[i]));
    return sum;
}

/* w[i] sqrt(sigma2 + x[i] x[i]): libggml's combination of the importance of a column with the size of the value. */
INLINE void weigh(const vf *x, vf *w, int n, vf sigma2) {
    for (int i = 0; i < n; i++)
        w[i] = vf_mul(w[i], vf_sqrt(vf_add(sigma2, vf_mul(x[i], x[i]))));
}

INLINE void weigh_by_square(const vf *x, vf *w, int n) {
    for (int i = 0; i < n; i++)
        w[i] = vf_mul(x[i], x[i]);
}

/* 1 / d, or 0 for 0. */
INLINE vf inverse_of(vf d) { return vf_select(vf_eq(d, vf_set(0)), vf_set(0), vf_div(vf_set(1), d)); }

INLINE vf sum_of(const vf *w, int n) {
    vf sum = vf_set(0);
    for (int i = 0; i < n; i++)
        sum = vf_add(sum, w[i]);
    return sum;
}

static inline void put_f16(uint8_t *out, float value) {
    uint16_t half = f16_of_float(value);
    memcpy(out, &half, sizeof half);
}

static inline float get_f16(const uint8_t *in) {
    uint16_t half;
    memcpy(&half, in, sizeof half);
    return float_of_f16(half);
}

/* Four levels, each below 256, become the bytes of a word. */
INLINE vi word_of(vi a, vi b, vi c, vi d) { return vi_or(vi_or(a, vi_shl(b, 8)), vi_or(vi_shl(c, 16), vi_shl(d, 24))); }

/* One number per sub-block and lane; a row is a vector. */
struct sub_floats {
    lane_floats of[MAX_SUBS];
};

INLINE void spread(const vf *values, int subs, struct sub_floats *out) {
    for (int j = 0; j < subs; j++)
        vf_store(out->of[j], values[j]);
}

/* The value of largest size, the first of equal ones. */
static inline float peak_scale(const struct sub_floats *scales, int subs, int lane) {
    float peak = 0, amount = 0;
    for (int j = 0; j < subs; j++)
        if (fabsf(scales->of[j][lane]) > amount) {
            amount = fabsf(scales->of[j][lane]);
            peak = scales->of[j][lane];
        }
    return peak;
}

struct lane_ints {
    int32_t of[MAX_SUBS][LANES];
};

INLINE void spread_ints(const vi *values, int subs, struct lane_ints *out) {
    memcpy(out->of, values, (size_t)subs * sizeof *values);
}

/* Levels i and i + half of a block in the low and high halves of a byte. */
INLINE vi nibbles_of(const vi *levels, int half) {
    const vi low = vi_set(0xf);
    vi byte[4];
    for (int b = 0; b < 4; b++)
        byte[b] = vi_or(vi_and(levels[b], low), vi_shl(vi_and(levels[b + half], low), 4));
    return word_of(byte[0], byte[1], byte[2], byte[3]);
}

/* The two functions of a format in the table. */
#define PLAIN_AND_WEIGHTED(format)                                                                                     \
    static uint64_t format##_plain(const struct et_group *group) { return format(group, false); }                      \
    static uint64_t format##_weighted(const struct et_group *group) { return format(group, true); }

#include "quantize_32.h"
#include "quantize_iq4.h"
#include "quantize_k.h"

static const struct et_group_kernels types[] = {
    {ET_GGML_Q4_0, BLOCK, 18, WIDE, true, q4_0_plain, q4_0_weighted},
    {ET_GGML_Q4_1, BLOCK, 20, WIDE, true, q4_1_plain, q4_1_weighted},
    {ET_GGML_Q5_0, BLOCK, 22, WIDE, true, q5_0_plain, q5_0_weighted},
    {ET_GGML_Q5_1, BLOCK, 24, WIDE, true, q5_1_plain, q5_1_weighted},
    {ET_GGML_Q8_0, BLOCK, 34, WIDE, false, q8_0_plain, q8_0_plain},
    {ET_GGML_Q2_K, SUPER, 84, LANES, false, q2_k_plain, q2_k_weighted},
    {ET_GGML_Q3_K, SUPER, 110, LANES, false, q3_k_plain, q3_k_weighted},
    {ET_GGML_Q4_K, SUPER, 144, LANES, false, q4_k_plain, q4_k_weighted},
    {ET_GGML_Q5_K, SUPER, 176, LANES, false, q5_k_plain, q5_k_weighted},
    {ET_GGML_Q6_K, SUPER, 210, LANES, false, q6_k_plain, q6_k_weighted},
    {ET_GGML_IQ4_NL, BLOCK, 18, WIDE, false, iq4_nl_plain, iq4_nl_weighted},
    {ET_GGML_IQ4_XS, SUPER, 136, LANES, false, iq4_xs_plain, iq4_xs_weighted},
};

const struct et_quantize_kernels ET_KERNELS(quantize) = {types, sizeof types / sizeof types[0]};
