/* A heap of the k largest values, in the order of a stable sort: of equal values, the one with the lower index is
 * larger. Values arrive in the order of their indices, so a value that equals the smallest kept one never replaces it.
 * After the first few thousand values of a row hardly any does; the kernel that reads the row notes for each chunk
 * whether one might.
 */
#include "compare_top.h"
#include "dispatch.h"

#include <math.h>
#include <stdlib.h>

static bool is_worse(struct et_ranked a, struct et_ranked b) {
    return a.value < b.value || (a.value == b.value && a.index > b.index);
}

/* Inserts `item` at the free position `at`, moving items that are not worse away from the root. */
static void sift_up(struct et_top *top, int64_t at, struct et_ranked item) {
    while (at > 0 && is_worse(item, top->heap[(at - 1) / 2])) {
        top->heap[at] = top->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    top->heap[at] = item;
}

static void replace_worst(struct et_top *top, struct et_ranked item) {
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child + 1 < top->count && is_worse(top->heap[child + 1], top->heap[child]))
            child++;
        if (child >= top->count || !is_worse(top->heap[child], item))
            break;
        top->heap[at] = top->heap[child];
        at = child;
    }
    top->heap[at] = item;
}

float et_top_limit(const struct et_top *top) { return top->count < top->k ? -INFINITY : top->heap[0].value; }

void et_top_add(struct et_top *top, const float *values, int64_t begin, int64_t count, uint32_t above) {
    const struct et_compare_kernels *kernels = et_kernels()->compare;
    int64_t filled = 0;
    for (; filled < count && top->count < top->k; filled++)
        sift_up(top, top->count++, (struct et_ranked){values[filled], begin + filled});
    for (; above != 0; above &= above - 1) {
        int64_t chunk = (int64_t)__builtin_ctz(above) * ET_CHUNK;
        int64_t end = chunk + ET_CHUNK < count ? chunk + ET_CHUNK : count;
        int64_t i = kernels->first_above(values, chunk > filled ? chunk : filled, end, top->heap[0].value);
        for (; i < end; i = kernels->first_above(values, i + 1, end, top->heap[0].value))
            replace_worst(top, (struct et_ranked){values[i], begin + i});
    }
}

int64_t et_top_first(const struct et_top *top) {
    struct et_ranked best = top->heap[0];
    for (int64_t i = 1; i < top->count; i++)
        if (is_worse(best, top->heap[i]))
            best = top->heap[i];
    return best.index;
}

static int by_index(const void *left, const void *right) {
    int64_t a = ((const struct et_ranked *)left)->index, b = ((const struct et_ranked *)right)->index;
    return (a > b) - (a < b);
}

int64_t et_top_common(struct et_top *a, struct et_top *b) {
    qsort(a->heap, (size_t)a->count, sizeof *a->heap, by_index);
    qsort(b->heap, (size_t)b->count, sizeof *b->heap, by_index);
    int64_t common = 0;
    for (int64_t i = 0, j = 0; i < a->count && j < b->count;) {
        int64_t left = a->heap[i].index, right = b->heap[j].index;
        common += left == right;
        i += left <= right;
        j += right <= left;
    }
    return common;
}
