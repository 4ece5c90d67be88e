/* Comparison of logits, and log-probabilities in 16 bits. */
#include "py_module.h"

/* compare(reference, reference_dtype, other, other_dtype, targets, n, v, top_k, outputs, threads); outputs: kld,
 * same_top, nll_reference, nll, reverse_kld, entropy_reference, entropy, top_k_overlap */
static PyObject *py_compare(PyObject *self, PyObject *args) {
    (void)self;
    enum { OUTPUTS = 8, SAME_TOP = 1 };
    PyObject *reference, *other, *targets, *out[OUTPUTS], *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_compare_job job = {0};
    int reference_dtype, other_dtype, threads;
    long long n, v, top_k;
    if (!PyArg_ParseTuple(args, "OiOiOLLL(OOOOOOOO)i", &reference, &reference_dtype, &other, &other_dtype, &targets, &n,
                          &v, &top_k, &out[0], &out[1], &out[2], &out[3], &out[4], &out[5], &out[6], &out[7], &threads))
        return NULL;
    if (!et_take_dtype(reference_dtype, &job.reference_dtype) || !et_take_dtype(other_dtype, &job.other_dtype))
        return NULL;
    if (n > 0 && (top_k < 1 || top_k > v))
        return PyErr_Format(PyExc_ValueError, "top_k is %lld, expected 1 to %lld", top_k, v);
    job.n = n;
    job.v = v;
    job.top_k = top_k;
    static const char *const names[OUTPUTS] = {"kld",         "same_top",          "nll_reference", "nll",
                                               "reverse_kld", "entropy_reference", "entropy",       "top_k_overlap"};
    void *slots[OUTPUTS] = {&job.kld,         &job.same_top,          &job.nll_reference, &job.nll,
                            &job.reverse_kld, &job.entropy_reference, &job.entropy,       &job.top_k_overlap};
    if (!et_hold_input(&held, reference, "reference", n, v, et_dtype_bytes(job.reference_dtype), &job.reference) ||
        !et_hold_input(&held, other, "other", n, v, et_dtype_bytes(job.other_dtype), &job.other) ||
        !et_hold_input(&held, targets, "targets", n, 1, sizeof(int64_t), &job.targets))
        goto done;
    for (int i = 0; i < OUTPUTS; i++)
        if (!et_hold_output(&held, out[i], names[i], n, 1, i == SAME_TOP ? 1 : sizeof(double), slots[i]))
            goto done;
    ET_RUN(result, et_compare(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_encode_log_probs(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *logits, *scale, *min_log_prob, *codes, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_encode_job job = {0};
    int dtype, threads;
    long long n, v;
    if (!PyArg_ParseTuple(args, "OiLLOOOi", &logits, &dtype, &n, &v, &scale, &min_log_prob, &codes, &threads))
        return NULL;
    if (!et_take_dtype(dtype, &job.dtype))
        return NULL;
    job.n = n;
    job.v = v;
    if (!et_hold_input(&held, logits, "logits", n, v, et_dtype_bytes(job.dtype), &job.logits) ||
        !et_hold_output(&held, scale, "scale", n, 1, sizeof(float), &job.scale) ||
        !et_hold_output(&held, min_log_prob, "min_log_prob", n, 1, sizeof(float), &job.min_log_prob) ||
        !et_hold_output(&held, codes, "codes", n, v, sizeof(uint16_t), &job.codes))
        goto done;
    ET_RUN(result, et_encode(&job, threads));
done:
    et_release(&held);
    return result;
}

static PyObject *py_decode_log_probs(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *scale, *min_log_prob, *codes, *out, *result = NULL;
    struct et_buffers held = {.count = 0};
    struct et_decode_job job = {0};
    int threads;
    long long n, v;
    if (!PyArg_ParseTuple(args, "OOOLLOi", &scale, &min_log_prob, &codes, &n, &v, &out, &threads))
        return NULL;
    job.n = n;
    job.v = v;
    if (!et_hold_input(&held, scale, "scale", n, 1, sizeof(float), &job.scale) ||
        !et_hold_input(&held, min_log_prob, "min_log_prob", n, 1, sizeof(float), &job.min_log_prob) ||
        !et_hold_input(&held, codes, "codes", n, v, sizeof(uint16_t), &job.codes) ||
        !et_hold_output(&held, out, "out", n, v, sizeof(float), &job.out))
        goto done;
    ET_RUN(result, et_decode(&job, threads));
done:
    et_release(&held);
    return result;
}

PyMethodDef et_logits_methods[] = {
    ET_METHOD(compare, "reference, reference_dtype, other, other_dtype, targets, n, v, top_k, outputs, threads"),
    ET_METHOD(encode_log_probs, "logits, dtype, n, v, scale, min_log_prob, codes, threads"),
    ET_METHOD(decode_log_probs, "scale, min_log_prob, codes, n, v, out, threads"),
    ET_METHODS_END,
};
