/* Sequences that llama.cpp continues together; see llama_slots.c. A capsule holds them. */
#include "py_module.h"

#include <stdlib.h>

static const char CAPSULE[] = "edgetune_native.llama_slots";

struct holder {
    struct et_llama_slots *slots; /* NULL after llama_close */
    int32_t n_slots, room;
    int64_t v;
};

static PyObject *py_llama_open(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *path; /* bytes, by os.fsencode */
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path))
        return NULL;
    char message[512];
    bool is_open = et_llama_open(PyBytes_AsString(path), message, sizeof message);
    if (!is_open)
        PyErr_Format(PyExc_ImportError, "%s could not be used: %s", PyBytes_AsString(path), message);
    Py_DECREF(path);
    return is_open ? Py_NewRef(Py_None) : NULL;
}

static void destroy(PyObject *capsule) {
    struct holder *holder = PyCapsule_GetPointer(capsule, CAPSULE);
    et_llama_free(holder->slots);
    free(holder);
}

static PyObject *py_llama_new(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long context, vocab, stop;
    long long v;
    int n_slots, room, offset, n_batch, piece, is_exact;
    if (!PyArg_ParseTuple(args, "KKKiiiiiLp", &context, &vocab, &stop, &n_slots, &room, &offset, &n_batch, &piece, &v,
                          &is_exact))
        return NULL;
    if (n_slots < 1 || room < 1 || offset < 0 || n_batch < n_slots || piece < 1 || v < 1 || v > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "%d slots of %d tokens in batches of %d are not possible", n_slots, room,
                            n_batch);
    struct et_llama_config config = {.context = (void *)(uintptr_t)context,
                                     .vocab = (const void *)(uintptr_t)vocab,
                                     .stop = (volatile char *)(uintptr_t)stop,
                                     .n_slots = n_slots,
                                     .room = room,
                                     .offset = offset,
                                     .n_batch = n_batch,
                                     .piece = piece,
                                     .v = v,
                                     .is_exact = is_exact};
    struct holder *holder = calloc(1, sizeof *holder);
    if (!holder)
        return PyErr_NoMemory();
    holder->n_slots = n_slots, holder->room = room, holder->v = v;
    holder->slots = et_llama_new(&config);
    PyObject *capsule = holder->slots ? PyCapsule_New(holder, CAPSULE, destroy) : PyErr_NoMemory();
    if (!capsule) {
        et_llama_free(holder->slots);
        free(holder);
    }
    return capsule;
}

/* NULL, with an exception set, for another object, after llama_close, or for a number that is no slot. */
static struct holder *held_slots(PyObject *capsule, int slot) {
    struct holder *holder = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!holder)
        return NULL;
    if (!holder->slots || slot < 0 || slot >= holder->n_slots) {
        PyErr_Format(PyExc_ValueError, "slot %d of %d, %s", slot, holder->n_slots, holder->slots ? "open" : "closed");
        return NULL;
    }
    return holder;
}

static PyObject *py_llama_close(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O", &capsule))
        return NULL;
    struct holder *holder = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!holder)
        return NULL;
    et_llama_free(holder->slots);
    holder->slots = NULL;
    Py_RETURN_NONE;
}

static PyObject *py_llama_match(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *ids;
    int slot;
    long long n;
    const int32_t *tokens;
    if (!PyArg_ParseTuple(args, "OiOL", &capsule, &slot, &ids, &n))
        return NULL;
    struct holder *holder = held_slots(capsule, slot);
    struct et_buffers held = {.count = 0};
    PyObject *result = NULL;
    if (holder && n <= INT32_MAX && et_hold_input(&held, ids, "ids", 1, n, sizeof *tokens, &tokens))
        result = PyLong_FromLong(et_llama_match(holder->slots, slot, tokens, (int32_t)n));
    et_release(&held);
    return result;
}

static PyObject *py_llama_start(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *ids, *result = NULL;
    unsigned long long chain;
    long long n;
    int slot, kept, top_k, likely, draft, group;
    if (!PyArg_ParseTuple(args, "OiOLiKiiii", &capsule, &slot, &ids, &n, &kept, &chain, &top_k, &likely, &draft,
                          &group))
        return NULL;
    struct holder *holder = held_slots(capsule, slot);
    if (!holder)
        return NULL;
    struct et_buffers held = {.count = 0};
    struct et_llama_task task = {.kept = kept,
                                 .chain = (void *)(uintptr_t)chain,
                                 .top_k = top_k,
                                 .likely = likely,
                                 .draft = draft,
                                 .group = group};
    if (!et_hold_input(&held, ids, "ids", 1, n, sizeof *task.ids, &task.ids))
        goto done;
    task.n = (int32_t)n;
    if (n < 1 || n > holder->room || kept < 0 || kept >= n || likely < -1 || likely > holder->v || draft < 0 ||
        et_llama_is_running(holder->slots, slot) || kept > et_llama_match(holder->slots, slot, task.ids, task.n)) {
        PyErr_Format(PyExc_ValueError, "slot %d cannot begin with %lld tokens, %d of them kept", slot, n, kept);
        goto done;
    }
    int32_t found = et_llama_start(holder->slots, slot, &task);
    result = found == -1 ? PyErr_NoMemory() : PyLong_FromLong(found);
done:
    et_release(&held);
    return result;
}

static PyObject *py_llama_copy(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    int from, to;
    if (!PyArg_ParseTuple(args, "Oii", &capsule, &from, &to))
        return NULL;
    if (!held_slots(capsule, from))
        return NULL;
    struct holder *holder = held_slots(capsule, to);
    if (!holder)
        return NULL;
    if (from == to || et_llama_is_running(holder->slots, to))
        return PyErr_Format(PyExc_ValueError, "slot %d cannot be copied to slot %d", from, to);
    return PyBool_FromLong(et_llama_copy(holder->slots, from, to));
}

static PyObject *py_llama_mask(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *bits, *result = NULL;
    int slot;
    if (!PyArg_ParseTuple(args, "OiO", &capsule, &slot, &bits))
        return NULL;
    struct holder *holder = held_slots(capsule, slot);
    if (!holder)
        return NULL;
    struct et_buffers held = {.count = 0};
    const uint32_t *mask = NULL;
    if (bits == Py_None || et_hold_input(&held, bits, "bits", 1, (holder->v + 31) / 32, sizeof *mask, &mask)) {
        et_llama_mask(holder->slots, slot, mask);
        result = Py_NewRef(Py_None);
    }
    et_release(&held);
    return result;
}

static PyObject *py_llama_set_table(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *table, *result = NULL;
    long long count;
    int longest;
    if (!PyArg_ParseTuple(args, "OOLi", &capsule, &table, &count, &longest))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    if (!holder)
        return NULL;
    if (count < 1 || count > 1 << 30 || (count & (count - 1)) || longest < 1)
        return PyErr_Format(PyExc_ValueError, "a table of %lld cells is not possible", count);
    struct et_buffers held = {.count = 0};
    const uint64_t *cells;
    if (et_hold_input(&held, table, "cells", 1, count, sizeof *cells, &cells))
        result =
            et_llama_set_table(holder->slots, cells, (uint32_t)count, longest) ? Py_NewRef(Py_None) : PyErr_NoMemory();
    et_release(&held);
    return result;
}

static PyObject *py_llama_set_draft_model(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    unsigned long long context;
    if (!PyArg_ParseTuple(args, "OK", &capsule, &context))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    if (!holder)
        return NULL;
    et_llama_set_draft_model(holder->slots, (void *)(uintptr_t)context);
    Py_RETURN_NONE;
}

static PyObject *py_llama_set_costs(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    float costs[ET_LLAMA_COSTS];
    int adapts = 0;
    if (!PyArg_ParseTuple(args, "Offffff|p", &capsule, &costs[0], &costs[1], &costs[2], &costs[3], &costs[4], &costs[5],
                          &adapts))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    if (!holder)
        return NULL;
    et_llama_set_costs(holder->slots, costs, adapts);
    Py_RETURN_NONE;
}

static PyObject *py_llama_draft(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    int slot, most;
    if (!PyArg_ParseTuple(args, "Oii", &capsule, &slot, &most))
        return NULL;
    struct holder *holder = held_slots(capsule, slot);
    if (!holder)
        return NULL;
    if (most < 0 || most > 7)
        return PyErr_Format(PyExc_ValueError, "drafts of %d tokens are not possible", most);
    et_llama_draft(holder->slots, slot, most);
    Py_RETURN_NONE;
}

static PyObject *py_llama_drafted(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O", &capsule))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    return holder ? PyLong_FromLongLong(et_llama_drafted(holder->slots)) : NULL;
}

static PyObject *likely_tuple(const struct et_llama_chosen *chosen) {
    PyObject *tuple = PyTuple_New(chosen->n_likely > 0 ? chosen->n_likely : 0);
    for (int32_t i = 0; tuple && i < chosen->n_likely; i++) {
        PyObject *pair = Py_BuildValue("(id)", chosen->likely[i].token, chosen->likely[i].logprob);
        if (!pair || PyTuple_SetItem(tuple, i, pair) != 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

/* (slot, token, bytes or None, log-probability or None, likely tokens, 1 if it was guessed + 2 for a near tie) */
static PyObject *chosen_tuple(const struct et_llama_chosen *chosen) {
    PyObject *bytes =
        chosen->piece_size < 0 ? Py_NewRef(Py_None) : PyBytes_FromStringAndSize(chosen->piece, chosen->piece_size);
    PyObject *logprob = chosen->n_likely < 0 ? Py_NewRef(Py_None) : PyFloat_FromDouble(chosen->logprob);
    PyObject *likely = likely_tuple(chosen);
    if (!bytes || !logprob || !likely) {
        Py_XDECREF(bytes), Py_XDECREF(logprob), Py_XDECREF(likely);
        return NULL;
    }
    return Py_BuildValue("(iiNNNi)", chosen->slot, chosen->token, bytes, logprob, likely,
                         chosen->was_guessed + 2 * chosen->is_near_tie);
}

static PyObject *py_llama_turn(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    int group;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &group))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    if (!holder)
        return NULL;
    struct et_llama_turn turn;
    Py_BEGIN_ALLOW_THREADS turn = et_llama_turn(holder->slots, group);
    Py_END_ALLOW_THREADS PyObject *list = PyList_New(turn.count);
    for (int32_t i = 0; list && i < turn.count; i++) {
        PyObject *row = chosen_tuple(&turn.chosen[i]);
        if (!row || PyList_SetItem(list, i, row) != 0)
            Py_CLEAR(list);
    }
    return list ? Py_BuildValue("(iN)", turn.status, list) : NULL;
}

static PyObject *py_llama_stop(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    int slot;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &slot))
        return NULL;
    struct holder *holder = held_slots(capsule, slot);
    if (!holder)
        return NULL;
    et_llama_stop(holder->slots, slot);
    Py_RETURN_NONE;
}

static PyObject *py_llama_has_prompts(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O", &capsule))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    return holder ? PyBool_FromLong(et_llama_has_prompts(holder->slots)) : NULL;
}

static PyObject *py_llama_interrupt(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O", &capsule))
        return NULL;
    struct holder *holder = held_slots(capsule, 0);
    if (!holder)
        return NULL;
    et_llama_interrupt(holder->slots);
    Py_RETURN_NONE;
}

PyMethodDef et_llama_methods[] = {
    ET_METHOD(llama_open, "path"),
    ET_METHOD(llama_new, "context, vocab, stop, n_slots, room, offset, n_batch, piece, v, is_exact"),
    ET_METHOD(llama_close, "slots"),
    ET_METHOD(llama_match, "slots, slot, ids, n"),
    ET_METHOD(llama_start, "slots, slot, ids, n, kept, chain, top_k, likely, draft, group"),
    ET_METHOD(llama_copy, "slots, source, target"),
    ET_METHOD(llama_mask, "slots, slot, bits"),
    ET_METHOD(llama_set_table, "slots, cells, count, longest"),
    ET_METHOD(llama_set_draft_model, "slots, context"),
    ET_METHOD(llama_set_costs, "slots, of_1, of_2, of_4, of_8, of_16, of_32, adapts"),
    ET_METHOD(llama_draft, "slots, slot, most"),
    ET_METHOD(llama_drafted, "slots"),
    ET_METHOD(llama_turn, "slots, group"),
    ET_METHOD(llama_stop, "slots, slot"),
    ET_METHOD(llama_has_prompts, "slots"),
    ET_METHOD(llama_interrupt, "slots"),
    ET_METHODS_END,
};
