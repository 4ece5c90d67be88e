/* The only file that knows Python: edgetune_native._native, on the stable ABI of 3.11.
 *
 * The Python face (face.py) checks dtypes and shapes and allocates; this file checks once more what could corrupt memory
 * (length, contiguity, alignment, writability), lets go of the GIL, calls one kernel and turns its code into an exception.
 * Every function that holds buffers leaves through one label, where they are released.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "edgetune.h"

/* --- the door for buffers ------------------------------------------------------------------------------------------ */

enum { MAX_BUFFERS = 16 };

struct buffers {
    Py_buffer view[MAX_BUFFERS];
    int count;
};

static void release(struct buffers *held) {
    while (held->count > 0)
        PyBuffer_Release(&held->view[--held->count]);
}

/* rows * columns * item as bytes; false if that is negative or does not fit. */
static bool byte_count(int64_t rows, int64_t columns, size_t item, Py_ssize_t *bytes) {
    int64_t elements;
    return rows >= 0 && columns >= 0 && !__builtin_mul_overflow(rows, columns, &elements) &&
           !__builtin_mul_overflow(elements, item, bytes);
}

/* Holds the memory of `object`, which must be exactly [rows, columns] contiguous elements of `item` bytes. */
static bool hold(struct buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns, size_t item,
                 int flags, void *pointer_slot) {
    Py_ssize_t bytes;
    if (!byte_count(rows, columns, item, &bytes)) {
        PyErr_Format(PyExc_ValueError, "%s: %lld x %lld elements are not a size", what, (long long)rows,
                     (long long)columns);
        return false;
    }
    Py_buffer *view = &held->view[held->count];
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | flags) != 0)
        return false;
    held->count++;
    if (view->len != bytes) {
        PyErr_Format(PyExc_ValueError, "%s holds %zd bytes, expected %zd (%lld x %lld elements of %zu bytes)", what,
                     view->len, bytes, (long long)rows, (long long)columns, item);
        return false;
    }
    if (bytes > 0 && (uintptr_t)view->buf % item != 0) {
        PyErr_Format(PyExc_ValueError, "%s is not aligned to its elements of %zu bytes", what, item);
        return false;
    }
    *(void **)pointer_slot = view->buf;
    return true;
}

static bool hold_input(struct buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                       size_t item, void *pointer_slot) {
    return hold(held, object, what, rows, columns, item, PyBUF_SIMPLE, pointer_slot);
}

static bool hold_output(struct buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                        size_t item, void *pointer_slot) {
    return hold(held, object, what, rows, columns, item, PyBUF_WRITABLE, pointer_slot);
}

/* --- codes to exceptions ------------------------------------------------------------------------------------------- */

/* The only place where a kernel's code becomes an exception. Returns None, or NULL with the exception set. */
static PyObject *result_of(struct et_outcome outcome) {
    long long row = (long long)outcome.row;
    switch (outcome.status) {
    case ET_OK:
        Py_RETURN_NONE;
    case ET_NO_MEMORY:
        return PyErr_NoMemory();
    case ET_NOT_A_NUMBER:
        return PyErr_Format(PyExc_ValueError, "row %lld holds a NaN or +inf, which is no logit", row);
    case ET_NO_MASS:
        return PyErr_Format(PyExc_ValueError, "row %lld has no finite logit, so it is no distribution", row);
    case ET_BAD_TARGET:
        return PyErr_Format(PyExc_ValueError, "row %lld: the target is not an index into the vocabulary", row);
    case ET_GGML_REFUSED:
        return PyErr_Format(PyExc_ValueError,
                            "libggml cannot quantize row %lld to this type: its values are not finite, or too large or "
                            "too small", row);
    case ET_GGML_SIZE:
        return PyErr_Format(PyExc_RuntimeError, "libggml wrote another number of bytes than its row size promises");
    case ET_NOT_FINITE:
        return PyErr_Format(PyExc_ValueError, "row %lld holds a NaN or an infinity, expected finite weights", row);
    case ET_SCALE_TOO_LARGE:
        return PyErr_Format(PyExc_ValueError,
                            "row %lld needs a scale above 65504, the largest float16; use scales of float32", row);
    }
    return PyErr_Format(PyExc_SystemError, "unknown status %d", (int)outcome.status);
}

/* --- libggml ------------------------------------------------------------------------------------------------------- */

static bool ggml_is_open = false;

static PyObject *py_open_ggml(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *path; /* bytes, by os.fsencode */
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path))
        return NULL;
    char message[512];
    ggml_is_open = et_ggml_open(PyBytes_AsString(path), message, sizeof message);
    if (!ggml_is_open)
        PyErr_Format(PyExc_ImportError, "%s could not be used: %s", PyBytes_AsString(path), message);
    Py_DECREF(path);
    return ggml_is_open ? PyUnicode_FromString(et_ggml_version()) : NULL;
}

static bool require_ggml(void) {
    if (!ggml_is_open)
        PyErr_SetString(PyExc_RuntimeError, "open_ggml has not been called");
    return ggml_is_open;
}

static PyObject *py_ggml_types(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    if (!require_ggml())
        return NULL;
    PyObject *list = PyList_New(0);
    struct et_ggml_type type;
    for (size_t i = 0; list && et_ggml_type_at(i, &type); i++) {
        PyObject *row = Py_BuildValue("(siLnO)", type.name, type.id, (long long)type.block_size,
                                      (Py_ssize_t)type.block_bytes, type.requires_weights ? Py_True : Py_False);
        if (!row || PyList_Append(list, row) != 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

/* Looks the type up and computes its row size; the memory of the caller depends on both, so they are not taken on trust. */
static bool row_layout(int id, int64_t k, const void *weights, size_t *row_bytes) {
    struct et_ggml_type type;
    if (!require_ggml())
        return false;
    if (!et_ggml_type_by_id(id, &type)) {
        PyErr_Format(PyExc_ValueError, "ggml type %d cannot be quantized to", id);
        return false;
    }
    if (k <= 0 || k % type.block_size != 0 ||
        __builtin_mul_overflow((size_t)(k / type.block_size), type.block_bytes, row_bytes)) {
        PyErr_Format(PyExc_ValueError, "%s: a row of %lld is not a whole number of blocks of %lld", type.name,
                     (long long)k, (long long)type.block_size);
        return false;
    }
    if (type.requires_weights && !weights) {
        PyErr_Format(PyExc_ValueError, "%s cannot be quantized without weights", type.name);
        return false;
    }
    return true;
}

/* quantize(rows, dtype, type, n, k, weights | None, out, threads) */
static PyObject *py_quantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *weights, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_quantize_job job = {0};
    int dtype, threads;
    long long n, k;
    if (!PyArg_ParseTuple(args, "OiiLLOOi", &rows, &dtype, &job.type, &n, &k, &weights, &out, &threads))
        return NULL;
    if (dtype < ET_F32 || dtype > ET_BF16)
        return PyErr_Format(PyExc_ValueError, "dtype %d is not one of 0 (f32), 1 (f16), 2 (bf16)", dtype);
    job.dtype = (enum et_dtype)dtype;
    job.n = n;
    job.k = k;
    if (weights != Py_None && !hold_input(&held, weights, "weights", 1, k, sizeof(float), &job.weights))
        goto done;
    if (!row_layout(job.type, k, job.weights, &job.row_bytes) ||
        !hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !hold_output(&held, out, "out", n, (int64_t)job.row_bytes, 1, &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_quantize(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* dequantize(blocks, type, n, k, out, threads) */
static PyObject *py_dequantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *blocks, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_dequantize_job job = {0};
    int threads;
    long long n, k;
    if (!PyArg_ParseTuple(args, "OiLLOi", &blocks, &job.type, &n, &k, &out, &threads))
        return NULL;
    job.n = n;
    job.k = k;
    /* blocks begin with 16-bit scales at even offsets, so libggml reads them from any even address */
    if (!row_layout(job.type, k, &job, &job.row_bytes) ||
        !hold_input(&held, blocks, "blocks", n, (int64_t)job.row_bytes, 1, &job.blocks) ||
        !hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_dequantize(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* --- adapters ------------------------------------------------------------------------------------------------------ */

static bool is_dtype(int dtype) {
    if (dtype >= ET_F32 && dtype <= ET_BF16)
        return true;
    PyErr_Format(PyExc_ValueError, "dtype %d is not one of 0 (f32), 1 (f16), 2 (bf16)", dtype);
    return false;
}

/* add_product(rows, dtype, left, right, n, r, k, out, threads) */
static PyObject *py_add_product(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *left, *right, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_product_job job = {0};
    int dtype, threads;
    long long n, r, k;
    if (!PyArg_ParseTuple(args, "OiOOLLLOi", &rows, &dtype, &left, &right, &n, &r, &k, &out, &threads))
        return NULL;
    if (!is_dtype(dtype))
        return NULL;
    job.dtype = (enum et_dtype)dtype;
    job.n = n, job.r = r, job.k = k;
    if (!hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !hold_input(&held, left, "left", n, r, sizeof(float), &job.left) ||
        !hold_input(&held, right, "right", r, k, sizeof(float), &job.right) ||
        !hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_add_product(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* --- logits -------------------------------------------------------------------------------------------------------- */

/* compare(reference, reference_dtype, other, other_dtype, targets, n, v, top_k, outputs, threads); outputs: kld,
 * same_top, nll_reference, nll, reverse_kld, entropy_reference, entropy, top_k_overlap */
static PyObject *py_compare(PyObject *self, PyObject *args) {
    (void)self;
    enum { OUTPUTS = 8, SAME_TOP = 1 };
    PyObject *reference, *other, *targets, *out[OUTPUTS], *result = NULL;
    struct buffers held = {.count = 0};
    struct et_compare_job job = {0};
    int reference_dtype, other_dtype, threads;
    long long n, v, top_k;
    if (!PyArg_ParseTuple(args, "OiOiOLLL(OOOOOOOO)i", &reference, &reference_dtype, &other, &other_dtype, &targets, &n,
                          &v, &top_k, &out[0], &out[1], &out[2], &out[3], &out[4], &out[5], &out[6], &out[7], &threads))
        return NULL;
    if (!is_dtype(reference_dtype) || !is_dtype(other_dtype))
        return NULL;
    if (n > 0 && (top_k < 1 || top_k > v))
        return PyErr_Format(PyExc_ValueError, "top_k is %lld, expected 1 to %lld", top_k, v);
    job.reference_dtype = (enum et_dtype)reference_dtype;
    job.other_dtype = (enum et_dtype)other_dtype;
    job.n = n;
    job.v = v;
    job.top_k = top_k;
    static const char *const names[OUTPUTS] = {"kld",         "same_top",          "nll_reference", "nll",
                                               "reverse_kld", "entropy_reference", "entropy",       "top_k_overlap"};
    void *slots[OUTPUTS] = {&job.kld,         &job.same_top,          &job.nll_reference, &job.nll,
                            &job.reverse_kld, &job.entropy_reference, &job.entropy,       &job.top_k_overlap};
    if (!hold_input(&held, reference, "reference", n, v, et_dtype_bytes(job.reference_dtype), &job.reference) ||
        !hold_input(&held, other, "other", n, v, et_dtype_bytes(job.other_dtype), &job.other) ||
        !hold_input(&held, targets, "targets", n, 1, sizeof(int64_t), &job.targets))
        goto done;
    for (int i = 0; i < OUTPUTS; i++)
        if (!hold_output(&held, out[i], names[i], n, 1, i == SAME_TOP ? 1 : sizeof(double), slots[i]))
            goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_compare(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* encode_log_probs(logits, dtype, n, v, scale, min_log_prob, codes, threads) */
static PyObject *py_encode_log_probs(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *logits, *scale, *min_log_prob, *codes, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_encode_job job = {0};
    int dtype, threads;
    long long n, v;
    if (!PyArg_ParseTuple(args, "OiLLOOOi", &logits, &dtype, &n, &v, &scale, &min_log_prob, &codes, &threads))
        return NULL;
    if (!is_dtype(dtype))
        return NULL;
    job.dtype = (enum et_dtype)dtype;
    job.n = n;
    job.v = v;
    if (!hold_input(&held, logits, "logits", n, v, et_dtype_bytes(job.dtype), &job.logits) ||
        !hold_output(&held, scale, "scale", n, 1, sizeof(float), &job.scale) ||
        !hold_output(&held, min_log_prob, "min_log_prob", n, 1, sizeof(float), &job.min_log_prob) ||
        !hold_output(&held, codes, "codes", n, v, sizeof(uint16_t), &job.codes))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_encode(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* decode_log_probs(scale, min_log_prob, codes, n, v, out, threads) */
static PyObject *py_decode_log_probs(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *scale, *min_log_prob, *codes, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_decode_job job = {0};
    int threads;
    long long n, v;
    if (!PyArg_ParseTuple(args, "OOOLLOi", &scale, &min_log_prob, &codes, &n, &v, &out, &threads))
        return NULL;
    job.n = n;
    job.v = v;
    if (!hold_input(&held, scale, "scale", n, 1, sizeof(float), &job.scale) ||
        !hold_input(&held, min_log_prob, "min_log_prob", n, 1, sizeof(float), &job.min_log_prob) ||
        !hold_input(&held, codes, "codes", n, v, sizeof(uint16_t), &job.codes) ||
        !hold_output(&held, out, "out", n, v, sizeof(float), &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_decode(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* --- blocks for MatMulNBits --------------------------------------------------------------------------------------- */

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
    struct buffers held = {.count = 0};
    struct et_nbits_quantize_job job = {0};
    int dtype, symmetric, search, half, threads;
    long long n, k;
    int64_t k_blocks, row_bytes, zero_bytes;
    if (!PyArg_ParseTuple(args, "OiLLOiipppOOOi", &rows, &dtype, &n, &k, &weights, &job.format.bits,
                          &job.format.block_size, &symmetric, &search, &half, &codes, &scales, &zero_points, &threads))
        return NULL;
    if (dtype < ET_F32 || dtype > ET_BF16)
        return PyErr_Format(PyExc_ValueError, "dtype %d is not one of 0 (f32), 1 (f16), 2 (bf16)", dtype);
    job.dtype = (enum et_dtype)dtype;
    job.format.symmetric = symmetric;
    job.format.half_scales = half;
    job.search = search;
    job.n = n;
    job.k = k;
    if (!nbits_layout(&job.format, k, &k_blocks, &row_bytes, &zero_bytes))
        return NULL;
    if (!hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        (weights != Py_None && !hold_input(&held, weights, "weights", 1, k, sizeof(float), &job.weights)) ||
        !hold_output(&held, codes, "codes", n, row_bytes, 1, &job.codes) ||
        !hold_output(&held, scales, "scales", n, k_blocks, half ? 2 : 4, &job.scales) ||
        (!symmetric && !hold_output(&held, zero_points, "zero_points", n, zero_bytes, 1, &job.zero_points)))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_nbits_quantize(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* dequantize_blocks(codes, scales, half_scales, zero_points | None, bits, block_size, n, k, out, threads) */
static PyObject *py_dequantize_blocks(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *codes, *scales, *zero_points, *out, *result = NULL;
    struct buffers held = {.count = 0};
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
    if (!hold_input(&held, codes, "codes", n, row_bytes, 1, &job.codes) ||
        !hold_input(&held, scales, "scales", n, k_blocks, half ? 2 : 4, &job.scales) ||
        (zero_points != Py_None &&
         !hold_input(&held, zero_points, "zero_points", n, zero_bytes, 1, &job.zero_points)) ||
        !hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_nbits_dequantize(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* --- the formats of bitsandbytes ----------------------------------------------------------------------------------- */

/* Checks n x k elements in blocks of `blocksize` and gives their number and that of the blocks. */
static bool block_layout(long long n, long long k, long long blocksize, int64_t largest, int64_t *count,
                         int64_t *blocks) {
    Py_ssize_t bytes;
    if (!byte_count(n, k, sizeof(float), &bytes) || k < 1) {
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

static bool known_dtype(int dtype) {
    if (dtype < ET_F32 || dtype > ET_BF16)
        PyErr_Format(PyExc_ValueError, "dtype %d is not known", dtype);
    return dtype >= ET_F32 && dtype <= ET_BF16;
}

static bool hold_type(struct buffers *held, PyObject *values, struct et_four_bit *type) {
    const float *table; /* [16] */
    if (!hold_input(held, values, "values", 1, 16, sizeof(float), &table))
        return false;
    et_four_bit_of(table, type);
    return true;
}

/* absmax_4bit(rows, dtype, n, k, blocksize, absmax, threads) */
static PyObject *py_absmax_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *absmax, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_absmax_job job = {0};
    int dtype, threads;
    long long n, k, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OiLLLOi", &rows, &dtype, &n, &k, &blocksize, &absmax, &threads))
        return NULL;
    job.dtype = (enum et_dtype)dtype;
    job.k = k;
    job.blocksize = blocksize;
    if (!known_dtype(dtype) || !block_layout(n, k, blocksize, ET_LARGEST_BLOCK, &job.count, &blocks) ||
        !hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !hold_output(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.absmax))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_absmax(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* torch_mean(values, count, torch_threads) -> float */
static PyObject *py_torch_mean(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *values;
    struct buffers held = {.count = 0};
    const float *x;
    int torch_threads;
    long long count;
    if (!PyArg_ParseTuple(args, "OLi", &values, &count, &torch_threads))
        return NULL;
    if (torch_threads < 1 || count < 1)
        return PyErr_Format(PyExc_ValueError, "a mean of %lld numbers on %d threads", count, torch_threads);
    if (!hold_input(&held, values, "values", count, 1, sizeof(float), &x))
        return NULL;
    float mean;
    Py_BEGIN_ALLOW_THREADS
    mean = et_torch_mean(x, count, torch_threads);
    Py_END_ALLOW_THREADS
    release(&held);
    return PyFloat_FromDouble(mean);
}

/* nest_absmax(absmax, count, offset, nearest, blocksize, codes, nested_absmax, threads) */
static PyObject *py_nest_absmax(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *absmax, *nearest, *codes, *nested_absmax, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_nest_job job = {0};
    int threads;
    long long count, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OLfOLOOi", &absmax, &count, &job.offset, &nearest, &blocksize, &codes, &nested_absmax,
                          &threads))
        return NULL;
    job.blocksize = blocksize;
    if (!block_layout(count, 1, blocksize, INT64_MAX, &job.count, &blocks) ||
        !hold_input(&held, absmax, "absmax", count, 1, sizeof(float), &job.absmax) ||
        !hold_input(&held, nearest, "nearest", ET_NEAREST_SIZE, 1, 1, &job.nearest) ||
        !hold_output(&held, codes, "codes", count, 1, 1, &job.codes) ||
        !hold_output(&held, nested_absmax, "nested_absmax", blocks, 1, sizeof(float), &job.nested_absmax))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_nest(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* unnest_absmax(codes, count, map, nested_absmax, blocksize, offset, absmax, threads) */
static PyObject *py_unnest_absmax(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *codes, *map, *nested_absmax, *absmax, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_unnest_job job = {0};
    int threads;
    long long count, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OLOOLfOi", &codes, &count, &map, &nested_absmax, &blocksize, &job.offset, &absmax,
                          &threads))
        return NULL;
    job.blocksize = blocksize;
    if (!block_layout(count, 1, blocksize, INT64_MAX, &job.count, &blocks) ||
        !hold_input(&held, codes, "codes", count, 1, 1, &job.codes) ||
        !hold_input(&held, map, "map", 256, 1, sizeof(float), &job.map) ||
        !hold_input(&held, nested_absmax, "nested_absmax", blocks, 1, sizeof(float), &job.nested_absmax) ||
        !hold_output(&held, absmax, "absmax", count, 1, sizeof(float), &job.absmax))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_unnest(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* quantize_4bit(rows, dtype, n, k, absmax, blocksize, values, packed, threads) */
static PyObject *py_quantize_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *absmax, *values, *packed, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_four_bit type;
    struct et_quantize_4bit_job job = {.type = &type};
    int dtype, threads;
    long long n, k, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OiLLOLOOi", &rows, &dtype, &n, &k, &absmax, &blocksize, &values, &packed, &threads))
        return NULL;
    job.dtype = (enum et_dtype)dtype;
    job.blocksize = blocksize;
    if (!known_dtype(dtype) || !block_layout(n, k, blocksize, ET_LARGEST_BLOCK, &job.count, &blocks) ||
        !hold_type(&held, values, &type) ||
        !hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !hold_input(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.absmax) ||
        !hold_output(&held, packed, "packed", et_blocks(job.count, 2), 1, 1, &job.packed))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_quantize_4bit(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* dequantize_4bit(packed, count, absmax, blocksize, values, dtype, out, threads) */
static PyObject *py_dequantize_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *packed, *absmax, *values, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_four_bit type;
    struct et_dequantize_4bit_job job = {.type = &type};
    int dtype, threads;
    long long count, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OLOLOiOi", &packed, &count, &absmax, &blocksize, &values, &dtype, &out, &threads))
        return NULL;
    job.dtype = (enum et_dtype)dtype;
    job.blocksize = blocksize;
    if (!known_dtype(dtype) || !block_layout(count, 1, blocksize, ET_LARGEST_BLOCK, &job.count, &blocks) ||
        !hold_type(&held, values, &type) ||
        !hold_input(&held, packed, "packed", et_blocks(job.count, 2), 1, 1, &job.packed) ||
        !hold_input(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.absmax) ||
        !hold_output(&held, out, "out", count, 1, sizeof(float), &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_dequantize_4bit(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* roundtrip_4bit(rows, dtype, n, k, absmax, scales, blocksize, values, to, out, threads) */
static PyObject *py_roundtrip_4bit(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *absmax, *scales, *values, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_four_bit type;
    struct et_roundtrip_4bit_job job = {.from = {.type = &type}, .to = {.type = &type}};
    int dtype, to, threads;
    long long n, k, blocksize;
    int64_t blocks;
    if (!PyArg_ParseTuple(args, "OiLLOOLOiOi", &rows, &dtype, &n, &k, &absmax, &scales, &blocksize, &values, &to, &out,
                          &threads))
        return NULL;
    job.from.dtype = (enum et_dtype)dtype;
    job.to.dtype = (enum et_dtype)to;
    job.from.blocksize = job.to.blocksize = blocksize;
    if (!known_dtype(dtype) || !known_dtype(to) ||
        !block_layout(n, k, blocksize, ET_LARGEST_BLOCK, &job.from.count, &blocks) ||
        !hold_type(&held, values, &type) ||
        !hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.from.dtype), &job.from.rows) ||
        !hold_input(&held, absmax, "absmax", blocks, 1, sizeof(float), &job.from.absmax) ||
        !hold_input(&held, scales, "scales", blocks, 1, sizeof(float), &job.to.absmax) ||
        !hold_output(&held, out, "out", n, k, sizeof(float), &job.to.out))
        goto done;
    job.to.count = job.from.count;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_roundtrip_4bit(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* dequantize_int8(codes, scb, n, k, dtype, out, threads) */
static PyObject *py_dequantize_int8(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *codes, *scb, *out, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_dequantize_int8_job job = {0};
    int dtype, threads;
    long long n, k;
    if (!PyArg_ParseTuple(args, "OOLLiOi", &codes, &scb, &n, &k, &dtype, &out, &threads))
        return NULL;
    job.dtype = (enum et_dtype)dtype;
    job.n = n;
    job.k = k;
    if (!known_dtype(dtype) || !hold_input(&held, codes, "codes", n, k, 1, &job.codes) ||
        !hold_input(&held, scb, "scb", n, 1, sizeof(float), &job.scb) ||
        !hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    struct et_outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = et_dequantize_int8(&job, threads);
    Py_END_ALLOW_THREADS
    result = result_of(outcome);
done:
    release(&held);
    return result;
}

/* --- the machine --------------------------------------------------------------------------------------------------- */

static struct et_cpu chosen; /* what import chose */

static PyObject *py_cpu(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return Py_BuildValue("(sss)", et_isa_name(et_isa_in_use), chosen.reason, chosen.features);
}

/* use_isa(name): for tests, which compare every instruction set in one process. */
static PyObject *py_use_isa(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    if (!et_cpu_choose(name, &chosen))
        return PyErr_Format(PyExc_ValueError, "%s", chosen.reason);
    Py_RETURN_NONE;
}

static PyObject *py_probe_amx(PyObject *self, PyObject *args) {
    (void)self;
    int force;
    struct et_amx amx;
    if (!PyArg_ParseTuple(args, "p", &force))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    et_amx_probe(force, &amx);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(OOs)", amx.advertised ? Py_True : Py_False, amx.usable ? Py_True : Py_False, amx.reason);
}

/* --- the module ---------------------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"open_ggml", py_open_ggml, METH_VARARGS, "open_ggml(path) -> version"},
    {"ggml_types", py_ggml_types, METH_NOARGS, "ggml_types() -> [(name, id, block_size, block_bytes, requires_weights)]"},
    {"quantize", py_quantize, METH_VARARGS, "quantize(rows, dtype, type, n, k, weights, out, threads)"},
    {"dequantize", py_dequantize, METH_VARARGS, "dequantize(blocks, type, n, k, out, threads)"},
    {"add_product", py_add_product, METH_VARARGS, "add_product(rows, dtype, left, right, n, r, k, out, threads)"},
    {"compare", py_compare, METH_VARARGS,
     "compare(reference, reference_dtype, other, other_dtype, targets, n, v, top_k, outputs, threads)"},
    {"encode_log_probs", py_encode_log_probs, METH_VARARGS,
     "encode_log_probs(logits, dtype, n, v, scale, min_log_prob, codes, threads)"},
    {"decode_log_probs", py_decode_log_probs, METH_VARARGS,
     "decode_log_probs(scale, min_log_prob, codes, n, v, out, threads)"},
    {"absmax_4bit", py_absmax_4bit, METH_VARARGS, "absmax_4bit(rows, dtype, n, k, blocksize, absmax, threads)"},
    {"torch_mean", py_torch_mean, METH_VARARGS, "torch_mean(values, count, torch_threads) -> float"},
    {"nest_absmax", py_nest_absmax, METH_VARARGS,
     "nest_absmax(absmax, count, offset, nearest, blocksize, codes, nested_absmax, threads)"},
    {"unnest_absmax", py_unnest_absmax, METH_VARARGS,
     "unnest_absmax(codes, count, map, nested_absmax, blocksize, offset, absmax, threads)"},
    {"quantize_4bit", py_quantize_4bit, METH_VARARGS,
     "quantize_4bit(rows, dtype, n, k, absmax, blocksize, values, packed, threads)"},
    {"dequantize_4bit", py_dequantize_4bit, METH_VARARGS,
     "dequantize_4bit(packed, count, absmax, blocksize, values, dtype, out, threads)"},
    {"roundtrip_4bit", py_roundtrip_4bit, METH_VARARGS,
     "roundtrip_4bit(rows, dtype, n, k, absmax, scales, blocksize, values, to, out, threads)"},
    {"dequantize_int8", py_dequantize_int8, METH_VARARGS, "dequantize_int8(codes, scb, n, k, dtype, out, threads)"},
    {"quantize_blocks", py_quantize_blocks, METH_VARARGS,
     "quantize_blocks(rows, dtype, n, k, weights, bits, block_size, symmetric, search, half_scales, codes, scales, "
     "zero_points, threads)"},
    {"dequantize_blocks", py_dequantize_blocks, METH_VARARGS,
     "dequantize_blocks(codes, scales, half_scales, zero_points, bits, block_size, n, k, out, threads)"},
    {"cpu", py_cpu, METH_NOARGS, "cpu() -> (isa, reason, features)"},
    {"use_isa", py_use_isa, METH_VARARGS, "use_isa(name), for tests"},
    {"probe_amx", py_probe_amx, METH_VARARGS, "probe_amx(force) -> (advertised, usable, reason)"},
    {NULL, NULL, 0, NULL},
};

/* An override that cannot be honoured stops the import: silently running other kernels would falsify what it is for. */
static int execute(PyObject *module) {
    (void)module;
    if (et_cpu_choose(getenv("EDGETUNE_ISA"), &chosen))
        return 0;
    PyErr_SetString(PyExc_ImportError, chosen.reason);
    return -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "edgetune_native._native",
    .m_doc = "Kernels in C; see edgetune_native for the checked and documented face.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}
