/* Logits of two models, row by row: Kullback-Leibler divergence, arg-max agreement, negative log-likelihoods.
 *
 * With A = log sum exp(a) and B likewise, KL(softmax a || softmax b) = sum p_a (a - b) - (A - B). Both rows are shifted by
 * their maxima first, so logits, log-probabilities and logits with any common offset give the same numbers, and equal
 * rows give exactly 0. Everything is added up in double.
 */
#include "compare_rows.h"

#include <math.h>

/* 512 KiB of logits a piece: large enough to hide the queue, small enough to share 2 rows of 150,000 between threads. */
enum { PIECE_ELEMENTS = 128 * 1024 };

const struct et_row_kernels *et_row_kernels(void) {
#ifdef __x86_64__
    if (et_isa_in_use == ET_AVX512)
        return &et_rows_avx512;
    if (et_isa_in_use == ET_AVX2)
        return &et_rows_avx2;
#endif
    return &et_rows_scalar;
}

enum et_status et_check_logits(struct et_extremes row) {
    if (row.has_nan || row.high == INFINITY)
        return ET_NOT_A_NUMBER;
    return row.high == -INFINITY ? ET_NO_MASS : ET_OK;
}

static enum et_status compare_row(const struct et_compare_job *job, int64_t row) {
    const struct et_row_kernels *kernels = et_row_kernels();
    const float *a = job->reference + row * job->v; /* [v] */
    const float *b = job->other + row * job->v;     /* [v] */
    int64_t target = job->targets[row];
    if (target < 0 || target >= job->v)
        return ET_BAD_TARGET;

    struct et_extremes ea = kernels->extremes(a, job->v), eb = kernels->extremes(b, job->v);
    enum et_status status = et_check_logits(ea);
    if (status == ET_OK)
        status = et_check_logits(eb);
    if (status != ET_OK)
        return status;

    struct et_pair_sums sums = kernels->pair_sums(a, b, job->v, ea.high, eb.high);
    double log_a = log(sums.reference), log_b = log(sums.other);
    double kld = sums.cross / sums.reference - (log_a - log_b);
    job->kld[row] = kld > 0.0 ? kld : 0.0; /* a divergence is not negative; rounding may be, by some 1e-16 */
    job->nll_reference[row] = log_a - ((double)a[target] - ea.high);
    job->nll[row] = log_b - ((double)b[target] - eb.high);
    job->same_top[row] =
        kernels->first_index_of(a, job->v, ea.high) == kernels->first_index_of(b, job->v, eb.high);
    return ET_OK;
}

static enum et_status compare_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    for (int64_t row = begin; row < end; row++) {
        enum et_status status = compare_row(argument, row);
        if (status != ET_OK) {
            *bad_row = row;
            return status;
        }
    }
    return ET_OK;
}

struct et_outcome et_compare(const struct et_compare_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->v, PIECE_ELEMENTS), threads, compare_rows, job);
}
