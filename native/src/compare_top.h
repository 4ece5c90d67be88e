/* The k largest of a row, kept while the row goes by. */
#ifndef EDGETUNE_COMPARE_TOP_H
#define EDGETUNE_COMPARE_TOP_H

#include "compare_kernel.h"

struct et_ranked {
    float value;
    int64_t index;
};

struct et_top {
    struct et_ranked *heap; /* [k] the worst of those kept at heap[0]; caller's memory */
    int64_t count, k;
};

/* What a value must be above to belong to the k largest so far. */
float et_top_limit(const struct et_top *top);

/* Takes in values[count], whose first one has the index `begin` in the row. Bit i of `above` tells whether chunk i of
 * them has any above et_top_limit as it was before. */
void et_top_add(struct et_top *top, const float *values, int64_t begin, int64_t count, uint32_t above);

/* The index of the largest; of equals the lowest. */
int64_t et_top_first(const struct et_top *top);

/* How many indices both have; leaves the heaps in another order. */
int64_t et_top_common(struct et_top *a, struct et_top *b);

#endif
