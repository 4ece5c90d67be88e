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

enum { MAX_BUFFERS = 8 };

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

/* --- logits -------------------------------------------------------------------------------------------------------- */

/* compare(reference, other, targets, n, v, kld, same_top, nll_reference, nll, threads) */
static PyObject *py_compare(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *reference, *other, *targets, *kld, *same_top, *nll_reference, *nll, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_compare_job job = {0};
    int threads;
    long long n, v;
    if (!PyArg_ParseTuple(args, "OOOLLOOOOi", &reference, &other, &targets, &n, &v, &kld, &same_top, &nll_reference,
                          &nll, &threads))
        return NULL;
    job.n = n;
    job.v = v;
    if (!hold_input(&held, reference, "reference", n, v, sizeof(float), &job.reference) ||
        !hold_input(&held, other, "other", n, v, sizeof(float), &job.other) ||
        !hold_input(&held, targets, "targets", n, 1, sizeof(int64_t), &job.targets) ||
        !hold_output(&held, kld, "kld", n, 1, sizeof(double), &job.kld) ||
        !hold_output(&held, same_top, "same_top", n, 1, 1, &job.same_top) ||
        !hold_output(&held, nll_reference, "nll_reference", n, 1, sizeof(double), &job.nll_reference) ||
        !hold_output(&held, nll, "nll", n, 1, sizeof(double), &job.nll))
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

/* encode_log_probs(logits, n, v, scale, min_log_prob, codes, threads) */
static PyObject *py_encode_log_probs(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *logits, *scale, *min_log_prob, *codes, *result = NULL;
    struct buffers held = {.count = 0};
    struct et_encode_job job = {0};
    int threads;
    long long n, v;
    if (!PyArg_ParseTuple(args, "OLLOOOi", &logits, &n, &v, &scale, &min_log_prob, &codes, &threads))
        return NULL;
    job.n = n;
    job.v = v;
    if (!hold_input(&held, logits, "logits", n, v, sizeof(float), &job.logits) ||
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
    {"compare", py_compare, METH_VARARGS,
     "compare(reference, other, targets, n, v, kld, same_top, nll_reference, nll, threads)"},
    {"encode_log_probs", py_encode_log_probs, METH_VARARGS,
     "encode_log_probs(logits, n, v, scale, min_log_prob, codes, threads)"},
    {"decode_log_probs", py_decode_log_probs, METH_VARARGS,
     "decode_log_probs(scale, min_log_prob, codes, n, v, out, threads)"},
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
