/* The only file that calls libggml. The library (that of llama-cpp-python; Python passes its path) is opened at run
 * time. Nothing is linked, so the extension loads without it, and an error reports what is missing. */
#include "edgetune.h"
#include "ggml_abi.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

static const struct {
    int id;
    const char *name;
} QUANTIZABLE[] = {
#define ET_GGML_ID(name, id) {id, #name},
    ET_GGML_TYPES(ET_GGML_ID)
#undef ET_GGML_ID
};
enum { QUANTIZABLE_COUNT = sizeof QUANTIZABLE / sizeof QUANTIZABLE[0] };

/* What resolve_symbols found in the library. */
static struct {
    void *handle;
#define ET_GGML_MEMBER(returned, name, parameters) returned(*name) parameters;
    ET_GGML_FUNCTIONS(ET_GGML_MEMBER, int, struct et_ggml_traits)
#undef ET_GGML_MEMBER
} ggml;

/* On rows that are not finite, and on some that are (tiny, or 1e30), an assertion of the IQ1 to IQ3 quantizers fails,
 * and libggml calls abort(). That must not end an export. libggml calls this callback first, which jumps back into our
 * call, if this thread is in one. Those quantizers are plain C that holds no lock and no memory at that point. */
static _Thread_local jmp_buf *recovery_point = NULL;
static et_ggml_abort_fn callback_before = NULL;

static void on_abort(const char *message) {
    if (recovery_point)
        longjmp(*recovery_point, 1);
    if (callback_before)
        callback_before(message);
    else
        fprintf(stderr, "%s\n", message);
}

static bool resolve_symbols(char *message, size_t size) {
    const struct {
        const char *name;
        void *slot;
    } symbols[] = {
#define ET_GGML_SYMBOL(returned, name, parameters) {"ggml_" #name, &ggml.name},
        ET_GGML_FUNCTIONS(ET_GGML_SYMBOL, int, struct et_ggml_traits)
#undef ET_GGML_SYMBOL
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(ggml.handle, symbols[i].name);
        if (!symbol) {
            snprintf(message, size, "it has no function %s", symbols[i].name);
            return false;
        }
        memcpy(symbols[i].slot, &symbol, sizeof symbol); /* ISO C has no cast from object pointer to function pointer */
    }
    return true;
}

/* Whether the library's types are those that ggml_abi.h declares: names, and sizes as the library's functions give
 * them. */
static bool types_fit(char *message, size_t size) {
    for (size_t i = 0; i < QUANTIZABLE_COUNT; i++) {
        const struct et_ggml_traits *traits = ggml.get_type_traits(QUANTIZABLE[i].id);
        int64_t block = ggml.blck_size(QUANTIZABLE[i].id);
        if (block <= 0 || traits->block_size != block ||
            ggml.row_size(QUANTIZABLE[i].id, block) != traits->block_bytes ||
            strcasecmp(traits->name, QUANTIZABLE[i].name) != 0) {
            snprintf(message, size, "its types are not those that edgetune knows (type %d, %s)", QUANTIZABLE[i].id,
                     QUANTIZABLE[i].name);
            return false;
        }
    }
    return true;
}

bool et_ggml_open(const char *path, char *message, size_t size) {
    if (ggml.handle)
        return true;
    ggml.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!ggml.handle) {
        snprintf(message, size, "%s", dlerror());
        return false;
    }
    if (resolve_symbols(message, size) && types_fit(message, size)) {
        callback_before = ggml.set_abort_callback(on_abort);
        return true;
    }
    dlclose(ggml.handle);
    ggml.handle = NULL;
    return false;
}

const char *et_ggml_version(void) { return ggml.version(); }

bool et_ggml_type_at(size_t i, struct et_ggml_type *type) {
    if (i >= QUANTIZABLE_COUNT)
        return false;
    int id = QUANTIZABLE[i].id;
    const struct et_ggml_traits *traits = ggml.get_type_traits(id);
    *type = (struct et_ggml_type){
        .id = id,
        .name = traits->name,
        .block_size = traits->block_size,
        .block_bytes = traits->block_bytes,
        .requires_weights = ggml.quantize_requires_imatrix(id),
    };
    return true;
}

bool et_ggml_type_by_id(int id, struct et_ggml_type *type) {
    for (size_t i = 0; et_ggml_type_at(i, type); i++)
        if (type->id == id)
            return true;
    return false;
}

void et_ggml_prepare(int id) { ggml.quantize_init(id); }

enum et_status et_ggml_quantize(int id, const float *rows, void *out, int64_t n, int64_t k, size_t row_bytes,
                                const float *weights) {
    jmp_buf here;
    if (!ggml.quantize_chunk)
        return ET_GGML_REFUSED;
    if (setjmp(here) != 0) {
        recovery_point = NULL;
        return ET_GGML_REFUSED;
    }
    recovery_point = &here;
    size_t written = ggml.quantize_chunk(id, rows, out, 0, n, k, weights);
    recovery_point = NULL;
    return written == (size_t)n * row_bytes ? ET_OK : ET_GGML_SIZE;
}

void et_ggml_dequantize_row(int id, const void *blocks, float *out, int64_t k) {
    const struct et_ggml_traits *traits = ggml.get_type_traits(id);
    if (traits->to_float)
        traits->to_float(blocks, out, k);
    else
        memcpy(out, blocks, (size_t)k * sizeof *out); /* f32 needs no conversion */
}
