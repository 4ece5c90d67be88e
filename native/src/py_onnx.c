/* Blocks of 4- and 8-bit codes for ONNX Runtime. */
#include "py_module.h"

/* Row sizes in bytes of what the blocks are stored in; false, with the exception set, if the format is not one. */
static bool nbits_layout(const struct et_nbits_format *format, long long k, int64_t *k_blocks, int64_t *row_bytes,
                         int64_t *zero_bytes) {
    int bits = format->bits, size = format->block_size;
    if ((bits != 4 && bits != 8) || size < 16 || size > 256 || (size & (size - 1)) != 0) {
        PyErr_Format(PyExc_ValueError, "%d bits in blocks of %d: expected 4 or 8, and 16, 32, 64, 128 or 256", bits,
                     size);
        return false;
    }
    if (k <= 0 || k > INT64_MAX / 16) {
        PyErr_Format(PyExc_ValueError, "a row of %lld weights is not a size", k);
        return false;
    }
    *k_blocks = (k - 1) / size + 1;
    *row_bytes = *k_blocks * (size * bits / 8);
    *zero_bytes = (*k_blocks * bits + 7) / 8;
    return true;
}

/* quantize_blocks(rows, dtype, n, k, weights | None, bits, block_size, symmetric, search, half_scales, codes, scales,
 *                 zero_points | None, threads) */
static PyObject *py_quantize_blocks(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *weights, *codes, *scales, *zero_points, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_nbits_quantize_job job = {0};
    int dtype, symmetric, search, half, threads;
    long long n, k;
    int64_t k_blocks, row_bytes, zero_bytes;
    if (!PyArg_ParseTuple(args, "OiLLOiipppOOOi", &rows, &dtype, &n, &k, &weights, &job.format.bits,
                          &job.format.block_size, &symmetric, &search, &half, &codes, &scales, &zero_points, &threads))
        return NULL;
    if (!et_take_dtype(dtype, &job.dtype))
        return NULL;
    job.format.symmetric = symmetric;
    job.format.half_scales = half;
    job.search = search;
    job.n = n;
    job.k = k;
    if (!nbits_layout(&job.format, k, &k_blocks, &row_bytes, &zero_bytes))
        return NULL;
    if (!et_hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        (weights != Py_None && !et_hold_input(&held, weights, "weights", 1, k, sizeof(float), &job.weights)) ||
        !et_hold_output(&held, codes, "codes", n, row_bytes, 1, &job.codes) ||
        !et_hold_output(&held, scales, "scales", n, k_blocks, half ? 2 : 4, &job.scales) ||
        (!symmetric && !et_hold_output(&held, zero_points, "zero_points", n, zero_bytes, 1, &job.zero_points)))
        goto done;
    ET_RUN(result, et_nbits_quantize(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_dequantize_blocks(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *codes, *scales, *zero_points, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_nbits_dequantize_job job = {0};
    int half, threads;
    long long n, k;
    int64_t k_blocks, row_bytes, zero_bytes;
    if (!PyArg_ParseTuple(args, "OOpOiiLLOi", &codes, &scales, &half, &zero_points, &job.format.bits,
                          &job.format.block_size, &n, &k, &out, &threads))
        return NULL;
    job.format.symmetric = zero_points == Py_None;
    job.format.half_scales = half;
    job.n = n;
    job.k = k;
    if (!nbits_layout(&job.format, k, &k_blocks, &row_bytes, &zero_bytes))
        return NULL;
    if (!et_hold_input(&held, codes, "codes", n, row_bytes, 1, &job.codes) ||
        !et_hold_input(&held, scales, "scales", n, k_blocks, half ? 2 : 4, &job.scales) ||
        (zero_points != Py_None &&
         !et_hold_input(&held, zero_points, "zero_points", n, zero_bytes, 1, &job.zero_points)) ||
        !et_hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    ET_RUN(result, et_nbits_dequantize(&job, threads));
done:
    et_release(&held);
    return result;
}

PyMethodDef et_onnx_methods[] = {
    ET_METHOD(quantize_blocks, "rows, dtype, n, k, weights, bits, block_size, symmetric, search, half_scales, codes, "
                               "scales, zero_points, threads"),
    ET_METHOD(dequantize_blocks, "codes, scales, half_scales, zero_points, bits, block_size, n, k, out, threads"),
    ET_METHODS_END,
};
