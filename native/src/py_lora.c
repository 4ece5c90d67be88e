/* Weights with the low-rank change of an adapter. */
#include "py_module.h"

static PyObject *py_add_product(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *left, *right, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_product_job job = {0};
    int dtype, threads;
    long long n, r, k;
    if (!PyArg_ParseTuple(args, "OiOOLLLOi", &rows, &dtype, &left, &right, &n, &r, &k, &out, &threads))
        return NULL;
    if (!et_take_dtype(dtype, &job.dtype))
        return NULL;
    job.n = n, job.r = r, job.k = k;
    if (!et_hold_input(&held, rows, "rows", n, k, et_dtype_bytes(job.dtype), &job.rows) ||
        !et_hold_input(&held, left, "left", n, r, sizeof(float), &job.left) ||
        !et_hold_input(&held, right, "right", r, k, sizeof(float), &job.right) ||
        !et_hold_output(&held, out, "out", n, k, sizeof(float), &job.out))
        goto done;
    ET_RUN(result, et_add_product(&job, threads));
done:
    et_release(&held);
    return result;
}

PyMethodDef et_lora_methods[] = {
    ET_METHOD(add_product, "rows, dtype, left, right, n, r, k, out, threads"),
    ET_METHODS_END,
};
