/* The k largest values of a row, collected while the row is read. */
#ifndef EDGETUNE_COMPARE_TOP_H
#define EDGETUNE_COMPARE_TOP_H

#include "compare_kernel.h"

struct et_ranked {
    float value;
    int64_t index;
};

struct et_top {
    struct et_ranked *heap; /* [k] the smallest of those kept is heap[0]; the caller's memory */
    int64_t count, k;
};

/* A value must be above this to be among the k largest so far. */
float et_top_limit(const struct et_top *top);

/* Adds values[count], the first of which has the index `begin` in the row. Bit i of `above`: chunk i has a value above
 * et_top_limit before the call. */
void et_top_add(struct et_top *top, const float *values, int64_t begin, int64_t count, uint32_t above);

/* The index of the largest value, the lowest index of equal ones. */
int64_t et_top_first(const struct et_top *top);

/* The number of indices that both have. Reorders the heaps. */
int64_t et_top_common(struct et_top *a, struct et_top *b);

#endif
