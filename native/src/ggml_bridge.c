/* The only file that speaks to libggml. It is opened at run time from the path that Python gives (llama-cpp-python's own
 * library): nothing is linked, so the extension loads on a machine without it and says what is missing. */
#include "edgetune.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <ggml.h>

/* Every type that ggml_quantize_chunk of the pinned version writes. It stops the process on any other, and there is no
 * way to ask it, so the list stands here. */
static const enum ggml_type QUANTIZABLE[] = {
    GGML_TYPE_F32,     GGML_TYPE_F16,    GGML_TYPE_BF16,    GGML_TYPE_Q4_0,  GGML_TYPE_Q4_1,    GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1,    GGML_TYPE_Q8_0,   GGML_TYPE_Q2_K,    GGML_TYPE_Q3_K,  GGML_TYPE_Q4_K,    GGML_TYPE_Q5_K,
    GGML_TYPE_Q6_K,    GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS,  GGML_TYPE_IQ3_S, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ2_S,
    GGML_TYPE_IQ2_XS,  GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ1_M,  GGML_TYPE_IQ1_S, GGML_TYPE_TQ1_0,   GGML_TYPE_TQ2_0,
    GGML_TYPE_MXFP4,   GGML_TYPE_NVFP4,  GGML_TYPE_Q1_0,    GGML_TYPE_Q2_0,
};
enum { QUANTIZABLE_COUNT = sizeof QUANTIZABLE / sizeof QUANTIZABLE[0] };

/* Declared with the types of ggml.h, so that a changed signature is a compile error and not a crash. */
static struct {
    void *handle;
    __typeof__(&ggml_quantize_chunk) quantize_chunk;
    __typeof__(&ggml_quantize_init) quantize_init;
    __typeof__(&ggml_quantize_requires_imatrix) requires_imatrix;
    __typeof__(&ggml_row_size) row_size;
    __typeof__(&ggml_blck_size) block_size;
    __typeof__(&ggml_get_type_traits) type_traits;
    __typeof__(&ggml_version) version;
    __typeof__(&ggml_set_abort_callback) set_abort_callback;
} ggml;

/* On rows that are not finite, and on some that are (tiny, or 1e30), the IQ1 to IQ3 quantizers fail an assertion, and
 * libggml then calls abort(). An export must not die of that, so the callback which libggml runs before jumps back into
 * our call, if this thread is in one. Those quantizers are plain C that holds no lock and no memory at that point. */
static _Thread_local jmp_buf *way_back = NULL;
static ggml_abort_callback_t callback_before = NULL;

static void on_abort(const char *message) {
    if (way_back)
        longjmp(*way_back, 1);
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
        {"ggml_quantize_chunk", &ggml.quantize_chunk},
        {"ggml_quantize_init", &ggml.quantize_init},
        {"ggml_quantize_requires_imatrix", &ggml.requires_imatrix},
        {"ggml_row_size", &ggml.row_size},
        {"ggml_blck_size", &ggml.block_size},
        {"ggml_get_type_traits", &ggml.type_traits},
        {"ggml_version", &ggml.version},
        {"ggml_set_abort_callback", &ggml.set_abort_callback},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(ggml.handle, symbols[i].name);
        if (!symbol) {
            snprintf(message, size, "it has no %s", symbols[i].name);
            return false;
        }
        memcpy(symbols[i].slot, &symbol, sizeof symbol); /* ISO C has no cast from object to function pointer */
    }
    return true;
}

/* The struct of type traits is read by the layout of our headers; the library's functions tell whether that is right. */
static bool layout_fits(char *message, size_t size) {
    for (size_t i = 0; i < QUANTIZABLE_COUNT; i++) {
        const struct ggml_type_traits *traits = ggml.type_traits(QUANTIZABLE[i]);
        int64_t block = ggml.block_size(QUANTIZABLE[i]);
        if (block <= 0 || traits->blck_size != block || ggml.row_size(QUANTIZABLE[i], block) != traits->type_size) {
            snprintf(message, size, "its types are not those of the headers that edgetune was built with (type %d)",
                     (int)QUANTIZABLE[i]);
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
    if (resolve_symbols(message, size) && layout_fits(message, size)) {
        callback_before = ggml.set_abort_callback(on_abort);
        return true;
    }
    dlclose(ggml.handle);
    ggml.handle = NULL;
    return false;
}

const char *et_ggml_version(void) {
    return ggml.version();
}

bool et_ggml_type_at(size_t i, struct et_ggml_type *type) {
    if (i >= QUANTIZABLE_COUNT)
        return false;
    enum ggml_type id = QUANTIZABLE[i];
    const struct ggml_type_traits *traits = ggml.type_traits(id);
    *type = (struct et_ggml_type){
        .id = (int)id,
        .name = traits->type_name,
        .block_size = traits->blck_size,
        .block_bytes = traits->type_size,
        .requires_weights = ggml.requires_imatrix(id),
    };
    return true;
}

bool et_ggml_type_by_id(int id, struct et_ggml_type *type) {
    for (size_t i = 0; et_ggml_type_at(i, type); i++)
        if (type->id == id)
            return true;
    return false;
}

void et_ggml_prepare(int id) {
    ggml.quantize_init((enum ggml_type)id);
}

enum et_status et_ggml_quantize(int id, const float *rows, void *out, int64_t n, int64_t k, size_t row_bytes,
                                const float *weights) {
    jmp_buf here;
    if (!ggml.quantize_chunk)
        return ET_GGML_REFUSED;
    if (setjmp(here) != 0) {
        way_back = NULL;
        return ET_GGML_REFUSED;
    }
    way_back = &here;
    size_t written = ggml.quantize_chunk((enum ggml_type)id, rows, out, 0, n, k, weights);
    way_back = NULL;
    return written == (size_t)n * row_bytes ? ET_OK : ET_GGML_SIZE;
}

void et_ggml_dequantize_row(int id, const void *blocks, float *out, int64_t k) {
    const struct ggml_type_traits *traits = ggml.type_traits((enum ggml_type)id);
    if (traits->to_float)
        traits->to_float(blocks, out, k);
    else
        memcpy(out, blocks, (size_t)k * sizeof *out); /* f32 has no converter: it is one */
}
