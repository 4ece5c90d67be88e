/* The row kernels that compare.c and codes.c are built of, one table per instruction set. */
#ifndef EDGETUNE_COMPARE_ROWS_H
#define EDGETUNE_COMPARE_ROWS_H

#include "edgetune.h"

struct et_extremes {
    float low, high; /* of the elements that are not NaN */
    bool has_nan;
};

/* With ea(i) = exp(a(i) - max a) and eb likewise: the sums of ea, of eb, and of ea * ((a - max a) - (b - max b)). */
struct et_pair_sums {
    double reference, other, cross;
};

struct et_row_kernels {
    struct et_extremes (*extremes)(const float *row, int64_t v);
    int64_t (*first_index_of)(const float *row, int64_t v, float value);
    struct et_pair_sums (*pair_sums)(const float *a, const float *b, int64_t v, float max_a, float max_b);
    double (*mass_sum)(const float *row, int64_t v, float max);
    void (*encode)(const float *row, int64_t v, float min, float inverse, uint16_t *codes);
    void (*decode)(const uint16_t *codes, int64_t v, float scale, float min, float *out);
};

extern const struct et_row_kernels et_rows_scalar;
#ifdef __x86_64__
extern const struct et_row_kernels et_rows_avx2;
extern const struct et_row_kernels et_rows_avx512;
#endif

/* The table for the instruction set in use. */
const struct et_row_kernels *et_row_kernels(void);

/* A row of logits that is a distribution: no NaN, no +inf, not all -inf. */
enum et_status et_check_logits(struct et_extremes row);

#endif
