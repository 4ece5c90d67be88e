/* Weights with the low-rank change of an adapter: out = rows + left right.
 *
 * Each element is a chain of fused multiply-adds in the order of r, starting at 0, and one addition to the weight: the
 * same bits on every instruction set and for any number of threads.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "product_kernel.h"

enum { PIECE_ELEMENTS = 256 * 1024 };

/* Columns first .. first + width - 1 of a matrix -> panel[count, ET_PANEL], padded with zeros. */
static void copy_columns(const char *matrix, size_t item, int64_t count, int64_t k, int64_t first, int64_t width,
                         char *panel) {
    if (width < ET_PANEL)
        memset(panel, 0, (size_t)count * ET_PANEL * item);
    for (int64_t i = 0; i < count; i++)
        memcpy(panel + (size_t)i * ET_PANEL * item, matrix + (size_t)(i * k + first) * item, (size_t)width * item);
}

/* Adds to the last columns, fewer than a panel has, row by row in a panel on the stack. */
static bool add_narrow(const struct et_product_job *job, struct et_panel *panel, int64_t begin, int64_t first,
                       int64_t width) {
    bool finite = true;
    _Alignas(64) char rows[ET_PANEL * sizeof(float)];
    float out[ET_PANEL];
    size_t item = et_dtype_bytes(job->dtype);
    int64_t end = begin + panel->n;
    panel->rows = rows, panel->out = out, panel->stride = ET_PANEL, panel->n = 1;
    for (int64_t row = begin; row < end; row++) {
        panel->left = job->left + row * job->r;
        copy_columns((const char *)job->rows + (size_t)(row * job->k) * item, item, 1, job->k, first, width, rows);
        finite = et_kernels()->product->add_panel(panel) && finite;
        memcpy(job->out + row * job->k + first, out, (size_t)width * sizeof *out);
    }
    return finite;
}

static int64_t first_not_finite(const struct et_product_job *job, int64_t begin, int64_t end) {
    int64_t element = begin * job->k;
    while (element < end * job->k && isfinite(job->out[element]))
        element++;
    return element / job->k;
}

/* Reads a piece once in order, which is fastest, before it is read column by column. */
static void prefetch(const char *first, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64)
        (void)*(const volatile char *)(first + at);
}

static enum et_status add_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_product_job *job = argument;
    size_t item = et_dtype_bytes(job->dtype);
    float *right = malloc((size_t)job->r * ET_PANEL * sizeof *right); /* [r, ET_PANEL] */
    bool finite = true;
    *bad_row = begin;
    if (!right)
        return ET_NO_MEMORY;
    prefetch((const char *)job->rows + (size_t)(begin * job->k) * item, (size_t)((end - begin) * job->k) * item);
    for (int64_t first = 0; first < job->k; first += ET_PANEL) {
        int64_t width = job->k - first < ET_PANEL ? job->k - first : ET_PANEL;
        copy_columns((const char *)job->right, sizeof *right, job->r, job->k, first, width, (char *)right);
        struct et_panel panel = {
            .dtype = job->dtype,
            .rows = (const char *)job->rows + (size_t)(begin * job->k + first) * item,
            .left = job->left + begin * job->r,
            .right = right,
            .out = job->out + begin * job->k + first,
            .n = end - begin,
            .r = job->r,
            .stride = job->k,
        };
        bool whole = width == ET_PANEL;
        finite =
            (whole ? et_kernels()->product->add_panel(&panel) : add_narrow(job, &panel, begin, first, width)) && finite;
    }
    free(right);
    if (finite)
        return ET_OK;
    *bad_row = first_not_finite(job, begin, end);
    return ET_NOT_FINITE;
}

struct et_outcome et_add_product(const struct et_product_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, add_rows, job);
}
