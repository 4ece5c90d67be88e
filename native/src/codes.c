/* Rows of log-probabilities in 16 bits, in the format of llama.cpp's --kl-divergence-base file:
 *
 *   min_logit    = max(min, max - 16)
 *   scale        = (max - min_logit) / 65535
 *   min_log_prob = min_logit - max - log(sum exp(l - max))
 *   code         = l > min_logit ? round((l - min_logit) / scale) : 0
 *
 * The arithmetic is f32 except for the sum, in llama.cpp's order of operations.
 */
#include "compare_kernel.h"
#include "compare_math.h"
#include "dispatch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE_ELEMENTS = 128 * 1024 };

static enum et_status encode_one(const struct et_encode_job *job, const float *logits /* [v] */, int64_t row) {
    const struct et_compare_kernels *kernels = et_kernels()->compare;
    uint16_t *codes = job->codes + row * job->v; /* [v] */
    struct et_extremes range = kernels->extremes(logits, job->v);
    enum et_status status = et_check_logits(range);
    if (status != ET_OK)
        return status;

    float max = range.high;
    float min = range.low > max - 16.0f ? range.low : max - 16.0f;
    float log_sum = (float)logarithm(kernels->mass_sum(logits, job->v, max));
    float scale = (max - min) / 65535.0f;
    float inverse = 1.0f / scale;
    job->scale[row] = isfinite(inverse) ? scale : 0.0f; /* a row that is flat, or flat to within 1e-34 */
    job->min_log_prob[row] = min - max - log_sum;
    if (isfinite(inverse))
        kernels->encode(logits, job->v, min, inverse, codes);
    else
        memset(codes, 0, (size_t)job->v * sizeof *codes);
    return ET_OK;
}

static enum et_status encode_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_encode_job *job = argument;
    float *widened = job->dtype == ET_F32 ? NULL : malloc((size_t)job->v * sizeof *widened); /* [v] */
    enum et_status status = job->dtype == ET_F32 || widened ? ET_OK : ET_NO_MEMORY;
    *bad_row = begin;
    for (int64_t row = begin; status == ET_OK && row < end; row++) {
        status = encode_one(job, et_as_floats(job->logits, job->dtype, row * job->v, job->v, widened), row);
        *bad_row = row;
    }
    free(widened);
    return status;
}

static enum et_status decode_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_decode_job *job = argument;
    (void)bad_row;
    for (int64_t row = begin; row < end; row++)
        et_kernels()->compare->decode(job->codes + row * job->v, job->v, job->scale[row], job->min_log_prob[row],
                                      job->out + row * job->v);
    return ET_OK;
}

struct et_outcome et_encode(const struct et_encode_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->v, PIECE_ELEMENTS), threads, encode_rows, job);
}

struct et_outcome et_decode(const struct et_decode_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->v, PIECE_ELEMENTS), threads, decode_rows, job);
}
