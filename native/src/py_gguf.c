/* The storage types of GGUF. */
#include "py_module.h"

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

/* Looks up the type and computes its row size, which bounds the accesses to the caller's memory. */
static bool row_layout(int id, int64_t k, bool has_weights, size_t *row_bytes) {
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
    if (type.requires_weights && !has_weights) {
        PyErr_Format(PyExc_ValueError, "%s cannot be quantized without weights", type.name);
        return false;
    }
    return true;
}

static PyObject *py_quantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *weights, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_quantize_job job = {0};
    int dtype, threads;
    long long n, k;
    if (!PyArg_ParseTuple(args, "OiiLLOOi", &rows, &dtype, &job.type, &n, &k, &weights, &out, &threads))
        return NULL;
    if (!et_take_dtype(dtype, &job.dtype))
        return NULL;
    job.n = n;
    job.k = k;
    if (weights != Py_None && !et_hold_input(&held, weights, "weights", 1, k, sizeof(float), &job.weights))
        goto done;
    if (!row_layout(job.type, k, job.weights != NULL, &job.row_bytes) ||
        !et_hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !et_hold_output(&held, out, "out", n, (int64_t)job.row_bytes, 1, &job.out))
        goto done;
    ET_RUN(result, et_quantize(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_dequantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *blocks, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_dequantize_job job = {0};
    int threads;
    long long n, k;
    if (!PyArg_ParseTuple(args, "OiLLOi", &blocks, &job.type, &n, &k, &out, &threads))
        return NULL;
    job.n = n;
    job.k = k;
    /* blocks begin with 16-bit scales at even offsets, so libggml reads them from any even address */
    if (!row_layout(job.type, k, true, &job.row_bytes) ||
        !et_hold_input(&held, blocks, "blocks", n, (int64_t)job.row_bytes, 1, &job.blocks) ||
        !et_hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    ET_RUN(result, et_dequantize(&job, threads));
done:
    et_release(&held);
    return result;
}

PyMethodDef et_gguf_methods[] = {
    ET_METHOD(open_ggml, "path"),
    ET_METHOD_NOARGS(ggml_types),
    ET_METHOD(quantize, "rows, dtype, type_id, n, k, weights, out, threads"),
    ET_METHOD(dequantize, "blocks, type_id, n, k, out, threads"),
    ET_METHODS_END,
};
