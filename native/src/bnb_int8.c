/* LLM.int8 weights: int8 codes with one scale per row. */
#include "bnb_kernel.h"
#include "dispatch.h"

enum { PIECE_ELEMENTS = 64 * 1024 };

static enum et_status scale_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_dequantize_int8_job *job = argument;
    (void)bad_row;
    for (int64_t row = begin; row < end; row++)
        et_kernels()->bnb->scale_int8(job->codes + row * job->k, job->k, job->scb[row], job->dtype,
                                      job->out + row * job->k);
    return ET_OK;
}

struct et_outcome et_dequantize_int8(const struct et_dequantize_int8_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, scale_rows, job);
}
