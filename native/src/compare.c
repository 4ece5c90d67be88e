/* Compares the logits of two models row by row: divergences, entropies, negative log-likelihoods, top-k agreement.
 *
 * With p = softmax(a), q = softmax(b), and e = exp(a - A), f = exp(b - B) for any origins A, B:
 *
 *   KL(p || q) = D / E - (w - log(1 + w)),  D = sum of (f - e + e u),  u = (a - A) - (b - B),  1 + w = F / E
 *
 * where E, F are the sums of e, f. No term of D is negative, and origins with E = F give w = 0. So the error of a
 * divergence is relative to it, however small it is, and equal rows give exactly 0. KL(q || p) is the same with the
 * rows exchanged.
 *
 * Each element is read once. The origins are estimated from the elements read so far: A is about the maximum, B such
 * that E and F are about equal. After each block they are improved, and the sums are moved to them (move_origins),
 * which is exact algebra. A block that the origins do not fit is summed again while it is in the cache.
 *
 * The errors are derived in compare_kernel.c.
 */
#include "compare_kernel.h"
#include "compare_math.h"
#include "compare_top.h"
#include "dispatch.h"

#include <math.h>
#include <stdlib.h>

/* A piece is 512 KiB of logits: large enough to hide the cost of the queue, small enough to share 2 rows of 150,000
 * between threads. The first origins are estimated from SAMPLE elements. A block of both rows, 64 KiB, fits a
 * second-level cache. */
enum { PIECE_ELEMENTS = 128 * 1024, SAMPLE = 256 };

/* How far a logit may be above its origin: exp of that times FARTHEST stays within f32, with a small error. */
static const float HEADROOM = 8.0f, HEADROOM_OTHER = 40.0f;

/* The largest |B - max b|. With E = F it is below log v, and 24 is the log of 2^34. */
static const float OFFSET = 24.0f;

enum et_status et_check_logits(struct et_extremes row) {
    if (row.has_nan || row.high == INFINITY)
        return ET_NOT_A_NUMBER;
    return row.high == -INFINITY ? ET_NO_MASS : ET_OK;
}

const float *et_as_floats(const void *row, enum et_dtype dtype, int64_t begin, int64_t count, float *scratch) {
    if (dtype == ET_F32)
        return (const float *)row + begin;
    et_kernels()->compare->widen((const uint16_t *)row + begin, dtype, count, scratch);
    return scratch;
}

/* --- origins
 * ------------------------------------------------------------------------------------------------------- */

/* A row pair in progress. */
struct progress {
    struct et_pair_sums sums;
    float a0, b0;           /* the origins A and B that the sums are of */
    float high_a, high_b;   /* the maxima of the elements in the sums */
    enum et_pair_kind kind; /* what a block needed; the next ones start with it */
    bool other_excludes;    /* b is -inf somewhere where a is not: KL(a || b) is infinite */
    bool reference_excludes;
};

/* Rounds to a multiple of 2^-14 where f32 is finer than that. The difference of such a number and a logit is mostly
 * exact. */
static float on_grid(double origin) {
    double scaled = origin * 16384.0;
    if (!(fabs(scaled) < 0x1p50))
        return (float)origin;
    const double shifter = 6755399441055744.0; /* 1.5 * 2^52 */
    return (float)((scaled + shifter - shifter) * (1.0 / 16384.0));
}

/* exp(x), and 0 where it is not finite or below the range of doubles. */
static double factor(double x) { return x > 0.0 && x <= 700.0 ? exponential(x) : mass(x > 0.0 ? -INFINITY : x); }

/* Updates the divergences for u + d, alpha e, and beta f with beta = alpha exp(-d), in forms without cancellation for
 * small d. */
static void move_near(struct et_pair_sums *sums, double alpha, double d) {
    double gone = exponential_residue(d), shrunk = gone - d; /* exp(-d) - 1 + d and exp(-d) - 1 */
    double beta = alpha * (1.0 + shrunk);
    double difference = sums->difference, f = sums->other;
    sums->difference = alpha * (difference - shrunk * f);
    sums->divergence = alpha * (sums->divergence + d * difference + gone * f);
    sums->reverse = beta * (sums->reverse + f * exponential_residue(-d)) - alpha * shrunk * difference;
}

static void move_far(struct et_pair_sums *sums, double alpha, double beta, double d) {
    double eu = alpha * (sums->divergence + sums->difference + d * sums->reference);
    double fu = beta * (sums->difference - sums->reverse + d * sums->other);
    sums->difference = alpha * sums->reference - beta * sums->other;
    sums->divergence = eu - sums->difference;
    sums->reverse = sums->difference - fu;
}

static void move_origins(struct progress *row, float a0, float b0) {
    struct et_pair_sums *sums = &row->sums;
    double da = (double)row->a0 - a0, db = (double)row->b0 - b0, d = da - db;
    row->a0 = a0;
    row->b0 = b0;
    if (da == 0.0 && db == 0.0)
        return;
    double alpha = sums->reference > 0.0 ? factor(da) : 0.0; /* an empty sum stays empty */
    double beta = sums->other > 0.0 ? factor(db) : 0.0;
    if (fabs(d) <= 1.0 && alpha > 0.0 && beta > 0.0)
        move_near(sums, alpha, d);
    else
        move_far(sums, alpha, beta, d);
    sums->reference_moment = alpha * (sums->reference_moment + da * sums->reference);
    sums->other_moment = beta * (sums->other_moment + db * sums->other);
    sums->reference *= alpha;
    sums->other *= beta;
}

/* Moves the origins to fit the sums, and logits up to high_a and high_b. */
static void improve_origins(struct progress *row, float high_a, float high_b) {
    const struct et_pair_sums *sums = &row->sums;
    float a0 = high_a > -INFINITY ? on_grid(high_a) : 0.0f;
    double b0 = high_b > -INFINITY ? high_b : 0.0;
    if (sums->reference > 0x1p-60 && sums->other > 0x1p-60) {
        double equal = row->b0 + logarithm(sums->other / sums->reference) - ((double)row->a0 - a0);
        b0 = equal < b0 - OFFSET ? b0 - OFFSET : equal > b0 + OFFSET ? b0 + OFFSET : equal;
    }
    move_origins(row, a0, on_grid(b0));
}

/* --- one row pair
 * -------------------------------------------------------------------------------------------------- */

static void add_sums(struct et_pair_sums *sums, const struct et_pair_sums *more) {
    sums->reference += more->reference;
    sums->other += more->other;
    sums->reference_moment += more->reference_moment;
    sums->other_moment += more->other_moment;
    sums->difference += more->difference;
    sums->divergence += more->divergence;
    sums->reverse += more->reverse;
}

static bool origins_fit(const struct progress *row, const struct et_pair_block *block) {
    return block->reference.high - row->a0 <= HEADROOM && block->other.high - row->b0 <= HEADROOM_OTHER;
}

/* The cheapest kind whose sums are right for this block. */
static enum et_pair_kind kind_needed(const struct progress *row, const struct et_pair_block *block) {
    if (!(block->reference.low - row->a0 >= ET_LOWEST && block->other.low - row->b0 >= ET_LOWEST))
        return ET_ANY;
    return block->far ? ET_PLAIN : row->kind;
}

/* Sums a block with the kind that it needs. */
static void sum_block(struct progress *row, const float *a, const float *b, int64_t count,
                      struct et_pair_block *block) {
    const struct et_compare_kernels *kernels = et_kernels()->compare;
    kernels->pair_block(a, b, count, row->a0, row->b0, row->kind, block);
    while (origins_fit(row, block) && kind_needed(row, block) > row->kind) {
        row->kind = kind_needed(row, block);
        kernels->pair_block(a, b, count, row->a0, row->b0, row->kind, block);
    }
}

/* Notes where one row gives probability 0 (-inf) to what the other allows: that divergence is infinite. */
static void note_exclusions(struct progress *row, const float *a, const float *b, int64_t count,
                            const struct et_pair_block *block) {
    const struct et_compare_kernels *kernels = et_kernels()->compare;
    if (block->other.low == -INFINITY && !row->other_excludes)
        row->other_excludes = kernels->excludes(a, b, count);
    if (block->reference.low == -INFINITY && !row->reference_excludes)
        row->reference_excludes = kernels->excludes(b, a, count);
}

/* Chooses the first origins and the first kind from the beginning of the rows. */
static enum et_status start_row(struct progress *row, const float *a, const float *b, int64_t count) {
    const struct et_compare_kernels *kernels = et_kernels()->compare;
    int64_t sample = count < SAMPLE ? count : SAMPLE;
    float high_a = kernels->extremes(a, sample).high, high_b = kernels->extremes(b, sample).high;
    *row = (struct progress){.high_a = -INFINITY, .high_b = -INFINITY};
    if (high_a == INFINITY || high_b == INFINITY)
        return ET_NOT_A_NUMBER;
    improve_origins(row, high_a, high_b);
    struct et_pair_block block = {.limit_a = 0.0f, .limit_b = 0.0f};
    if (sample < count)
        sum_block(row, a, b, sample, &block);
    return ET_OK;
}

/* Moves the origins to those of `better` and sums the block again. */
static void repeat_block(struct progress *row, const float *a, const float *b, int64_t count, struct progress *better,
                         struct et_pair_block *block) {
    improve_origins(better, row->high_a, row->high_b);
    move_origins(row, better->a0, better->b0);
    sum_block(row, a, b, count, block);
}

static double divergence_ratio(const struct et_pair_sums *sums) { /* w */
    double ratio = sums->other / sums->reference;
    /* near 0, the sum of the differences has no cancellation */
    return fabs(ratio - 1.0) < 0.125 ? -sums->difference / sums->reference : ratio - 1.0;
}

/* Whether, with this block, E and F are so unequal that w - log(1 + w) is most of D / E. Then D has the precision of
 * f32, but the divergence, which is their difference, has not. Origins on the grid allow 5e-10. */
static bool cancels(const struct progress *row, const struct et_pair_block *block, struct progress *with_block) {
    *with_block = *row;
    add_sums(&with_block->sums, &block->sums);
    const struct et_pair_sums *sums = &with_block->sums;
    if (!(sums->reference > 0x1p-60 && sums->other > 0x1p-60))
        return false;
    double lost = logarithm_residue(divergence_ratio(sums));
    return lost > 1e-9 && lost > 4.0 * (sums->divergence / sums->reference - lost);
}

static enum et_status add_pair_block(struct progress *row, const float *a, const float *b, int64_t count,
                                     struct et_pair_block *block) {
    sum_block(row, a, b, count, block);
    if (block->reference.high == INFINITY || block->other.high == INFINITY)
        return ET_NOT_A_NUMBER;
    row->high_a = block->reference.high > row->high_a ? block->reference.high : row->high_a;
    row->high_b = block->other.high > row->high_b ? block->other.high : row->high_b;
    struct progress better = *row;
    if (!origins_fit(row, block))
        repeat_block(row, a, b, count, &better, block);
    if (cancels(row, block, &better))
        repeat_block(row, a, b, count, &better, block);
    add_sums(&row->sums, &block->sums);
    if (isnan(row->sums.reference) || isnan(row->sums.other))
        return ET_NOT_A_NUMBER;
    note_exclusions(row, a, b, count, block);
    improve_origins(row, row->high_a, row->high_b);
    return ET_OK;
}

static double not_negative(double x) {
    return x > 0.0 ? x : 0.0; /* rounding may give -1e-7 for a log-likelihood, -1e-16 for a divergence */
}

static double logit_at(const void *logits, enum et_dtype dtype, int64_t at) {
    float scratch;
    return *et_as_floats(logits, dtype, at, 1, &scratch);
}

static void finish_row(const struct et_compare_job *job, int64_t at, const struct progress *row) {
    const struct et_pair_sums *sums = &row->sums;
    double log_a = logarithm(sums->reference), log_b = logarithm(sums->other), w = divergence_ratio(sums);
    double divergence = sums->divergence / sums->reference - logarithm_residue(w);
    double reverse = sums->reverse / sums->other - logarithm_residue(-w / (1.0 + w));
    int64_t target = at * job->v + job->targets[at];
    job->kld[at] = row->other_excludes ? INFINITY : not_negative(divergence);
    job->reverse_kld[at] = row->reference_excludes ? INFINITY : not_negative(reverse);
    job->nll_reference[at] = not_negative(log_a - (logit_at(job->reference, job->reference_dtype, target) - row->a0));
    job->nll[at] = not_negative(log_b - (logit_at(job->other, job->other_dtype, target) - row->b0));
    job->entropy_reference[at] = not_negative(log_a - sums->reference_moment / sums->reference);
    job->entropy[at] = not_negative(log_b - sums->other_moment / sums->other);
}

/* Memory of one thread. */
struct scratch {
    float wide_a[ET_BLOCK], wide_b[ET_BLOCK]; /* f16 and bf16 widened */
    struct et_top top_a, top_b;
};

static enum et_status compare_row(const struct et_compare_job *job, int64_t at, struct scratch *scratch) {
    struct progress row;
    scratch->top_a.count = scratch->top_b.count = 0;
    if (job->targets[at] < 0 || job->targets[at] >= job->v)
        return ET_BAD_TARGET;
    for (int64_t begin = 0; begin < job->v; begin += ET_BLOCK) {
        int64_t count = job->v - begin < ET_BLOCK ? job->v - begin : ET_BLOCK;
        int64_t first = at * job->v + begin;
        const float *a = et_as_floats(job->reference, job->reference_dtype, first, count, scratch->wide_a);
        const float *b = et_as_floats(job->other, job->other_dtype, first, count, scratch->wide_b);
        struct et_pair_block block = {.limit_a = et_top_limit(&scratch->top_a),
                                      .limit_b = et_top_limit(&scratch->top_b)};
        enum et_status status = begin == 0 ? start_row(&row, a, b, count) : ET_OK;
        if (status == ET_OK)
            status = add_pair_block(&row, a, b, count, &block);
        if (status != ET_OK)
            return status;
        et_top_add(&scratch->top_a, a, begin, count, block.above_a);
        et_top_add(&scratch->top_b, b, begin, count, block.above_b);
    }
    if (row.high_a == -INFINITY || row.high_b == -INFINITY)
        return ET_NO_MASS;
    finish_row(job, at, &row);
    job->same_top[at] = et_top_first(&scratch->top_a) == et_top_first(&scratch->top_b);
    job->top_k_overlap[at] = (double)et_top_common(&scratch->top_a, &scratch->top_b) / (double)job->top_k;
    return ET_OK;
}

static enum et_status compare_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_compare_job *job = argument;
    struct et_ranked *heaps = malloc(2 * (size_t)job->top_k * sizeof *heaps);
    struct scratch *scratch = malloc(sizeof *scratch);
    enum et_status status = heaps && scratch ? ET_OK : ET_NO_MEMORY;
    *bad_row = begin;
    if (status == ET_OK) {
        scratch->top_a = (struct et_top){.heap = heaps, .k = job->top_k};
        scratch->top_b = (struct et_top){.heap = heaps + job->top_k, .k = job->top_k};
    }
    for (int64_t row = begin; status == ET_OK && row < end; row++) {
        status = compare_row(job, row, scratch);
        *bad_row = row;
    }
    free(scratch);
    free(heaps);
    return status;
}

struct et_outcome et_compare(const struct et_compare_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->v, PIECE_ELEMENTS), threads, compare_rows, job);
}
