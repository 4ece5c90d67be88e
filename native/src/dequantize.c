/* GGUF blocks -> rows of f32 with the conversions of libggml, row by row on several threads. */
#include "edgetune.h"

enum { PIECE_ELEMENTS = 64 * 1024 };

static enum et_status dequantize_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_dequantize_job *job = argument;
    (void)bad_row;
    for (int64_t row = begin; row < end; row++)
        et_ggml_dequantize_row(job->type, job->blocks + (size_t)row * job->row_bytes, job->out + row * job->k, job->k);
    return ET_OK;
}

struct et_outcome et_dequantize(const struct et_dequantize_job *job, int threads) {
    return et_parallel_rows(job->n, et_grain(job->k, PIECE_ELEMENTS), threads, dequantize_rows, job);
}
