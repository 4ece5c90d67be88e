/* The formats of bitsandbytes. */
#include "py_module.h"

/* Checks n x k elements in blocks of `blocksize` and gives their number and that of the blocks. */
static bool block_layout(long long n, long long k, long long blocksize, int64_t largest, int64_t *count,
                         int64_t *blocks) {
    Py_ssize_t bytes;
    if (!et_byte_count(n, k, sizeof(float), &bytes) || k < 1) {
        PyErr_Format(PyExc_ValueError, "%lld x %lld elements are not a size", n, k);
        return false;
    }
    if (blocksize < 2 || blocksize % 2 || blocksize > largest) {
        PyErr_Format(PyExc_ValueError, "blocksize is %lld, expected an even number from 2 to %lld", blocksize,
                     (long long)largest);
        return false;
    }
    *count = n * k;
    *blocks = et_blocks(*count, blocksize);
    return true;
}

static bool hold_type(struct et_buffers *held, PyObject *values, struct et_four_bit *type) {
    const float *table; /* [16] */
    if (!et_hold_input(held, values, "values", 1, 16, sizeof(float), &table))
        return false;
    et_four_bit_of(table, type);
    return true;
}

static PyObject *py_absmax_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *absmax, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_absmax_job job = {0};
    int dtype, threads;
    long long n, k, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OiLLLOi", &rows, &dtype, &n, &k, &blocksize, &absmax, &threads))
        return NULL;
    job.k = k;
    job.blocksize = blocksize;
    if (!et_take_dtype(dtype, &job.dtype) || !block_layout(n, k, blocksize, ET_LARGEST_BLOCK, &job.count, &blocks) ||
        !et_hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !et_hold_output(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.absmax))
        goto done;
    ET_RUN(result, et_absmax(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_torch_mean(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *values;
    struct et_buffers held = {.count = 0};
    const float *x;
    int torch_threads;
    long long count;
    if (!PyArg_ParseTuple(args, "OLi", &values, &count, &torch_threads))
        return NULL;
    if (torch_threads < 1 || count < 1)
        return PyErr_Format(PyExc_ValueError, "a mean of %lld numbers on %d threads", count, torch_threads);
    if (!et_hold_input(&held, values, "values", count, 1, sizeof(float), &x))
        return NULL;
    float mean;
    Py_BEGIN_ALLOW_THREADS mean = et_torch_mean(x, count, torch_threads);
    Py_END_ALLOW_THREADS et_release(&held);
    return PyFloat_FromDouble(mean);
}

static PyObject *py_nest_absmax(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *absmax, *nearest, *codes, *nested_absmax, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_nest_job job = {0};
    int threads;
    long long count, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OLfOLOOi", &absmax, &count, &job.offset, &nearest, &blocksize, &codes, &nested_absmax,
                          &threads))
        return NULL;
    job.blocksize = blocksize;
    if (!block_layout(count, 1, blocksize, INT64_MAX, &job.count, &blocks) ||
        !et_hold_input(&held, absmax, "absmax", count, 1, sizeof(float), &job.absmax) ||
        !et_hold_input(&held, nearest, "nearest", ET_NEAREST_SIZE, 1, 1, &job.nearest) ||
        !et_hold_output(&held, codes, "codes", count, 1, 1, &job.codes) ||
        !et_hold_output(&held, nested_absmax, "nested_absmax", blocks, 1, sizeof(float), &job.nested_absmax))
        goto done;
    ET_RUN(result, et_nest(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_unnest_absmax(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *codes, *map, *nested_absmax, *absmax, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_unnest_job job = {0};
    int threads;
    long long count, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OLOOLfOi", &codes, &count, &map, &nested_absmax, &blocksize, &job.offset, &absmax,
                          &threads))
        return NULL;
    job.blocksize = blocksize;
    if (!block_layout(count, 1, blocksize, INT64_MAX, &job.count, &blocks) ||
        !et_hold_input(&held, codes, "codes", count, 1, 1, &job.codes) ||
        !et_hold_input(&held, map, "map", 256, 1, sizeof(float), &job.map) ||
        !et_hold_input(&held, nested_absmax, "nested_absmax", blocks, 1, sizeof(float), &job.nested_absmax) ||
        !et_hold_output(&held, absmax, "absmax", count, 1, sizeof(float), &job.absmax))
        goto done;
    ET_RUN(result, et_unnest(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_quantize_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *absmax, *values, *packed, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_four_bit type;
    struct et_quantize_4bit_job job = {.type = &type};
    int dtype, threads;
    long long n, k, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OiLLOLOOi", &rows, &dtype, &n, &k, &absmax, &blocksize, &values, &packed, &threads))
        return NULL;
    job.blocksize = blocksize;
    if (!et_take_dtype(dtype, &job.dtype) || !block_layout(n, k, blocksize, ET_LARGEST_BLOCK, &job.count, &blocks) ||
        !hold_type(&held, values, &type) ||
        !et_hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !et_hold_input(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.absmax) ||
        !et_hold_output(&held, packed, "packed", et_blocks(job.count, 2), 1, 1, &job.packed))
        goto done;
    ET_RUN(result, et_quantize_4bit(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_dequantize_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *packed, *absmax, *values, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_four_bit type;
    struct et_dequantize_4bit_job job = {.type = &type};
    int dtype, threads;
    long long count, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OLOLOiOi", &packed, &count, &absmax, &blocksize, &values, &dtype, &out, &threads))
        return NULL;
    job.blocksize = blocksize;
    if (!et_take_dtype(dtype, &job.dtype) ||
        !block_layout(count, 1, blocksize, ET_LARGEST_BLOCK, &job.count, &blocks) || !hold_type(&held, values, &type) ||
        !et_hold_input(&held, packed, "packed", et_blocks(job.count, 2), 1, 1, &job.packed) ||
        !et_hold_input(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.absmax) ||
        !et_hold_output(&held, out, "out", count, 1, sizeof(float), &job.out))
        goto done;
    ET_RUN(result, et_dequantize_4bit(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_roundtrip_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *absmax, *scales, *values, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_four_bit type;
    struct et_roundtrip_4bit_job job = {.from = {.type = &type}, .to = {.type = &type}};
    int dtype, to, threads;
    long long n, k, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OiLLOOLOiOi", &rows, &dtype, &n, &k, &absmax, &scales, &blocksize, &values, &to, &out,
                          &threads))
        return NULL;
    job.from.blocksize = job.to.blocksize = blocksize;
    if (!et_take_dtype(dtype, &job.from.dtype) || !et_take_dtype(to, &job.to.dtype) ||
        !block_layout(n, k, blocksize, ET_LARGEST_BLOCK, &job.from.count, &blocks) ||
        !hold_type(&held, values, &type) ||
        !et_hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.from.dtype), &job.from.rows) ||
        !et_hold_input(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.from.absmax) ||
        !et_hold_input(&held, scales, "scales", blocks, 1, sizeof(float), &job.to.absmax) ||
        !et_hold_output(&held, out, "out", n, k, sizeof(float), &job.to.out))
        goto done;
    job.to.count = job.from.count;
    ET_RUN(result, et_roundtrip_4bit(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_dequantize_int8(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *codes, *scb, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_dequantize_int8_job job = {0};
    int dtype, threads;
    long long n, k;
    if (!PyArg_ParseTuple(args, "OOLLiOi", &codes, &scb, &n, &k, &dtype, &out, &threads))
        return NULL;
    job.n = n;
    job.k = k;
    if (!et_take_dtype(dtype, &job.dtype) || !et_hold_input(&held, codes, "codes", n, k, 1, &job.codes) ||
        !et_hold_input(&held, scb, "scb", n, 1, sizeof(float), &job.scb) ||
        !et_hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    ET_RUN(result, et_dequantize_int8(&job, threads));
done:
    et_release(&held);
    return result;
}

PyMethodDef et_bnb_methods[] = {
    ET_METHOD(absmax_4bit, "rows, dtype, n, k, blocksize, absmax, threads"),
    ET_METHOD(torch_mean, "values, count, torch_threads"),
    ET_METHOD(nest_absmax, "absmax, count, offset, nearest, blocksize, codes, nested_absmax, threads"),
    ET_METHOD(unnest_absmax, "codes, count, quant_map, nested_absmax, blocksize, offset, absmax, threads"),
    ET_METHOD(quantize_4bit, "rows, dtype, n, k, absmax, blocksize, values, packed, threads"),
    ET_METHOD(dequantize_4bit, "packed, count, absmax, blocksize, values, dtype, out, threads"),
    ET_METHOD(roundtrip_4bit, "rows, dtype, n, k, absmax, scales, blocksize, values, to, out, threads"),
    ET_METHOD(dequantize_int8, "codes, scb, n, k, dtype, out, threads"),
    ET_METHODS_END,
};
