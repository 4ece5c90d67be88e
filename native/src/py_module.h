/* What the files that know Python share: the extension edgetune_native._native is module.c and the py_*.c.
 *
 * The public Python functions check dtypes and shapes and allocate. These files check again what could corrupt memory
 * (length, contiguity, alignment, writability), release the GIL, call one kernel and turn its status into an exception.
 * A function that holds buffers has one way out, where it releases them.
 */
#ifndef EDGETUNE_PY_MODULE_H
#define EDGETUNE_PY_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "edgetune.h"

enum { ET_MAX_BUFFERS = 16 };

struct et_buffers {
    Py_buffer view[ET_MAX_BUFFERS];
    int count;
};

/* Holds the memory of `object`, which must be exactly [rows, columns] contiguous elements of `item` bytes, and stores
 * its address in *pointer_slot. False, with an exception set, if it is not. */
bool et_hold_input(struct et_buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                   size_t item, void *pointer_slot);
bool et_hold_output(struct et_buffers *held, PyObject *object, const char *what, int64_t rows, int64_t columns,
                    size_t item, void *pointer_slot);
void et_release(struct et_buffers *held);

/* rows * columns * item as bytes; false if that is negative or does not fit. */
bool et_byte_count(int64_t rows, int64_t columns, size_t item, Py_ssize_t *bytes);

/* Stores an element type; false, with an exception set, if the number stands for none. */
bool et_take_dtype(int number, enum et_dtype *dtype);

/* None, or NULL with an exception set. */
PyObject *et_result_of(struct et_outcome outcome);

/* Runs a kernel without the GIL: result = None, or NULL with an exception set. */
#define ET_RUN(result, call)                                                                                           \
    do {                                                                                                               \
        struct et_outcome outcome;                                                                                     \
        Py_BEGIN_ALLOW_THREADS outcome = (call);                                                                       \
        Py_END_ALLOW_THREADS result = et_result_of(outcome);                                                           \
    } while (0)

/* An entry for the function py_<name>. inspect.signature() reads the parameters; a test compares them with the protocol
 * `Kernels` of _kernels.py. */
#define ET_METHOD(name, parameters) {#name, py_##name, METH_VARARGS, #name "($module, " parameters ", /)\n--\n\n"}
#define ET_METHOD_NOARGS(name) {#name, py_##name, METH_NOARGS, #name "($module, /)\n--\n\n"}
#define ET_METHODS_END {NULL, NULL, 0, NULL}

/* The functions of each py_*.c. */
extern PyMethodDef et_gguf_methods[], et_lora_methods[], et_logits_methods[], et_onnx_methods[], et_bnb_methods[],
    et_llama_methods[];

#endif
