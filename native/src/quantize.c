/* Rows of weights -> GGUF blocks. The format is libggml's affair; ours are the threads and the element type. */
#include "edgetune.h"

#include <stdlib.h>
#include <string.h>

/* 128 KiB of f32: a converted tile stays in the second-level cache until it is quantized. */
enum { TILE_ELEMENTS = 32 * 1024 };

size_t et_dtype_bytes(enum et_dtype dtype) {
    return dtype == ET_F32 ? sizeof(float) : sizeof(uint16_t);
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void widen_bf16(const uint16_t *source /* [count] */, float *out /* [count] */, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        out[i] = float_of_bits((uint32_t)source[i] << 16);
}

/* Exact for every one of the 65536 patterns (tested). Branch-free, so that the compiler makes it a vector loop. */
static void widen_f16(const uint16_t *source /* [count] */, float *out /* [count] */, int64_t count) {
    const float magic = float_of_bits((uint32_t)(254 - 15) << 23); /* 2^112: from the exponent bias of f16 to f32's */
    for (int64_t i = 0; i < count; i++) {
        uint32_t sign = (uint32_t)(source[i] & 0x8000) << 16;
        uint32_t rest = (uint32_t)(source[i] & 0x7fff) << 13;
        float scaled = float_of_bits(rest) * magic; /* also right for denormals: the product is exact */
        uint32_t bits;
        memcpy(&bits, &scaled, sizeof bits);
        uint32_t not_finite = rest >= 0x0f800000 ? 0x7f800000 | rest : 0;
        out[i] = float_of_bits(sign | bits | not_finite);
    }
}

/* f32 rows[count, k], which are rows begin.. of the job. If libggml stops in them, one by one finds the row at fault. */
static enum et_status quantize_floats(const struct et_quantize_job *job, const float *rows, int64_t begin,
                                      int64_t count, int64_t *bad_row) {
    uint8_t *out = job->out + (size_t)begin * job->row_bytes;
    enum et_status status = et_ggml_quantize(job->type, rows, out, count, job->k, job->row_bytes, job->weights);
    if (status != ET_GGML_REFUSED || count == 1)
        return status;
    for (int64_t i = 0; i < count; i++) {
        *bad_row = begin + i;
        status = et_ggml_quantize(job->type, rows + i * job->k, out, 1, job->k, job->row_bytes, job->weights);
        if (status != ET_OK)
            return status;
    }
    return ET_GGML_REFUSED;
}

static enum et_status quantize_halves(const struct et_quantize_job *job, int64_t begin, int64_t rows,
                                      int64_t *bad_row) {
    int64_t count = rows * job->k;
    float *tile = malloc((size_t)count * sizeof *tile); /* [rows, k] */
    if (!tile)
        return ET_NO_MEMORY;
    const uint16_t *source = (const uint16_t *)job->rows + begin * job->k;
    if (job->dtype == ET_F16)
        widen_f16(source, tile, count);
    else
        widen_bf16(source, tile, count);
    enum et_status status = quantize_floats(job, tile, begin, rows, bad_row);
    free(tile);
    return status;
}

static enum et_status quantize_rows(const void *argument, int64_t begin, int64_t end, int64_t *bad_row) {
    const struct et_quantize_job *job = argument;
    if (job->dtype != ET_F32)
        return quantize_halves(job, begin, end - begin, bad_row);
    return quantize_floats(job, (const float *)job->rows + begin * job->k, begin, end - begin, bad_row);
}

/* Rows are never split: with weights the legacy types take a variance over the whole row. */
struct et_outcome et_quantize(const struct et_quantize_job *job, int threads) {
    et_ggml_prepare(job->type);
    return et_parallel_rows(job->n, et_grain(job->k, TILE_ELEMENTS), threads, quantize_rows, job);
}
