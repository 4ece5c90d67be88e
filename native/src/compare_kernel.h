/* The inner loops over rows of logits, implemented for each instruction set by compare_kernel.c. */
#ifndef EDGETUNE_COMPARE_KERNEL_H
#define EDGETUNE_COMPARE_KERNEL_H

#include "edgetune.h"

struct et_extremes {
    float low, high; /* of the elements other than NaN */
    bool has_nan;
};

/* Sums over a row pair a, b with origins A, B: e = exp(a - A), f = exp(b - B), u = (a - A) - (b - B). */
struct et_pair_sums {
    double reference;        /* e */
    double other;            /* f */
    double reference_moment; /* e (a - A) */
    double other_moment;     /* f (b - B) */
    double difference;       /* e - f */
    double divergence;       /* f - e + e u, at least 0: with sums of e and f both 1 this is KL(e || f) */
    double reverse;          /* e - f - f u, at least 0: likewise KL(f || e) */
};

/* A chunk of elements shares one bit of et_pair_block.above_*; the largest block has 16 chunks. */
enum { ET_CHUNK = 512, ET_BLOCK = 16 * ET_CHUNK };

/* Which elements the sums of a block accept, from the cheapest kind on. Whether it was sufficient is checked
 * afterwards. */
enum et_pair_kind {
    ET_NEAR,  /* |u| < 1/2 and as below: f follows from e, so that one exponential is enough */
    ET_PLAIN, /* a - A and b - B at least ET_LOWEST */
    ET_ANY,   /* all floats */
};

struct et_pair_block {
    float limit_a, limit_b; /* given */
    struct et_pair_sums sums;
    struct et_extremes reference, other; /* has_nan is not set: the sums show a NaN */
    uint32_t above_a, above_b;           /* bit i: chunk i has an element above the limit */
    bool far;                            /* for ET_NEAR: some |u| was 1/2 or more */
};

struct et_compare_kernels {
    /* Sums one block. If `kind` does not accept an element, or one is 64 above its origin, only the sums are wrong. */
    void (*pair_block)(const float *a, const float *b, int64_t count, float a0, float b0, enum et_pair_kind kind,
                       struct et_pair_block *block);
    /* The first i >= begin with row[i] > value, or end. */
    int64_t (*first_above)(const float *row, int64_t begin, int64_t end, float value);
    /* Whether some b is -inf where a is finite. */
    bool (*excludes)(const float *a, const float *b, int64_t count);
    void (*widen)(const uint16_t *row, enum et_dtype dtype, int64_t count, float *out);
    struct et_extremes (*extremes)(const float *row, int64_t v);
    double (*mass_sum)(const float *row, int64_t v, float max);
    void (*encode)(const float *row, int64_t v, float min, float inverse, uint16_t *codes);
    void (*decode)(const uint16_t *codes, int64_t v, float scale, float min, float *out);
};

#define ET_LOWEST (-87.0f)

/* Elements begin .. begin + count - 1 of a row as f32: in place, or widened into scratch[count]. */
const float *et_as_floats(const void *row, enum et_dtype dtype, int64_t begin, int64_t count, float *scratch);

/* Checks that a row of logits is a distribution: no NaN, no +inf, not all -inf. */
enum et_status et_check_logits(struct et_extremes row);

#endif
