/* The extension module edgetune_native._native, on the stable ABI of Python 3.11: what py_module.h declares, the choice
 * of the instruction set, and the table of functions. */
#include "py_module.h"

#include <stdlib.h>

/* --- buffers
 * ------------------------------------------------------------------------------------------------------- */

bool et_byte_count(int64_t rows, int64_t columns, size_t item, Py_ssize_t *bytes) {
    int64_t elements;
    return rows >= 0 && columns >= 0 && !__builtin_mul_overflow(rows, columns, &elements) &&
           !__builtin_mul_overflow(elements, item, bytes);
}

static bool hold(struct et_buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                 size_t item, int flags, void *pointer_slot) {
    Py_ssize_t bytes;
    if (!et_byte_count(rows, columns, item, &bytes)) {
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

bool et_hold_input(struct et_buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                   size_t item, void *pointer_slot) {
    return hold(held, object, what, rows, columns, item, PyBUF_SIMPLE, pointer_slot);
}

bool et_hold_output(struct et_buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                    size_t item, void *pointer_slot) {
    return hold(held, object, what, rows, columns, item, PyBUF_WRITABLE, pointer_slot);
}

void et_release(struct et_buffers *held) {
    while (held->count > 0)
        PyBuffer_Release(&held->view[--held->count]);
}

/* --- element types and exceptions
 * ---------------------------------------------------------------------------------- */

bool et_take_dtype(int number, enum et_dtype *dtype) {
    *dtype = (enum et_dtype)number;
    if (number >= ET_F32 && number <= ET_BF16)
        return true;
    PyErr_Format(PyExc_ValueError, "dtype %d is not one of 0 (f32), 1 (f16), 2 (bf16)", number);
    return false;
}

PyObject *et_result_of(struct et_outcome outcome) {
    long long row = (long long)outcome.row;
    switch (outcome.status) {
    case ET_OK:
        Py_RETURN_NONE;
    case ET_NO_MEMORY:
        return PyErr_NoMemory();
    case ET_NOT_A_NUMBER:
        return PyErr_Format(PyExc_ValueError, "row %lld contains NaN or +inf, not a valid logit", row);
    case ET_NO_MASS:
        return PyErr_Format(PyExc_ValueError, "row %lld has no finite logit, so it is not a distribution", row);
    case ET_BAD_TARGET:
        return PyErr_Format(PyExc_ValueError, "row %lld: the target is not an index into the vocabulary", row);
    case ET_GGML_REFUSED:
        return PyErr_Format(PyExc_ValueError,
                            "libggml cannot quantize row %lld to this type: its values are not finite, too large or "
                            "too small",
                            row);
    case ET_GGML_SIZE:
        return PyErr_Format(PyExc_RuntimeError, "libggml wrote a number of bytes that differs from its row size");
    case ET_NOT_FINITE:
        return PyErr_Format(PyExc_ValueError, "row %lld holds a NaN or an infinity, expected finite weights", row);
    case ET_SCALE_TOO_LARGE:
        return PyErr_Format(PyExc_ValueError,
                            "row %lld needs a scale above 65504, the largest float16; use float32 scales", row);
    }
    return PyErr_Format(PyExc_SystemError, "unknown status %d", (int)outcome.status);
}

/* --- the instruction set
 * --------------------------------------------------------------------------------------------- */

static struct et_cpu chosen; /* what import chose */

static PyObject *py_cpu(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return Py_BuildValue("(sss)", et_isa_name(et_isa_in_use), chosen.reason, chosen.features);
}

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
    Py_BEGIN_ALLOW_THREADS et_amx_probe(force, &amx);
    Py_END_ALLOW_THREADS return Py_BuildValue("(OOs)", amx.advertised ? Py_True : Py_False,
                                              amx.usable ? Py_True : Py_False, amx.reason);
}

static PyMethodDef cpu_methods[] = {
    ET_METHOD_NOARGS(cpu),
    ET_METHOD(probe_amx, "force"),
    ET_METHOD(use_isa, "name"),
    ET_METHODS_END,
};

/* --- the module
 * ---------------------------------------------------------------------------------------------------- */

static PyMethodDef *const METHODS[] = {cpu_methods,     et_gguf_methods, et_lora_methods, et_logits_methods,
                                       et_onnx_methods, et_bnb_methods,  et_llama_methods};

/* An EDGETUNE_ISA that this CPU does not have stops the import: other kernels would falsify what it is set for. */
static int execute(PyObject *module) {
    if (!et_cpu_choose(getenv("EDGETUNE_ISA"), &chosen)) {
        PyErr_SetString(PyExc_ImportError, chosen.reason);
        return -1;
    }
    for (size_t i = 0; i < sizeof METHODS / sizeof METHODS[0]; i++)
        if (PyModule_AddFunctions(module, METHODS[i]) != 0)
            return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "edgetune_native._native",
    .m_doc = "Kernels in C. The functions of edgetune_native check the arguments and call these.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
