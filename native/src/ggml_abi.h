/* The part of ggml's binary interface that ggml_bridge.c uses, declared here so that edgetune compiles without ggml's
 * headers: libggml is opened at run time. tests/test_ggml_abi.c holds these declarations against the installed headers;
 * et_ggml_open holds the sizes of the types against the opened library.
 */
#ifndef EDGETUNE_GGML_ABI_H
#define EDGETUNE_GGML_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The storage types that ggml_quantize_chunk can write, X(name, id): `enum ggml_type`, as the ids stand in GGUF files.
 * On any other type that function ends the process, and there is no way to ask it. */
#define ET_GGML_TYPES(X)                                                                                               \
    X(F32, 0)                                                                                                          \
    X(F16, 1)                                                                                                          \
    X(BF16, 30)                                                                                                        \
    X(Q4_0, 2)                                                                                                         \
    X(Q4_1, 3)                                                                                                         \
    X(Q5_0, 6)                                                                                                         \
    X(Q5_1, 7)                                                                                                         \
    X(Q8_0, 8)                                                                                                         \
    X(Q2_K, 10)                                                                                                        \
    X(Q3_K, 11)                                                                                                        \
    X(Q4_K, 12)                                                                                                        \
    X(Q5_K, 13)                                                                                                        \
    X(Q6_K, 14)                                                                                                        \
    X(IQ4_NL, 20)                                                                                                      \
    X(IQ4_XS, 23)                                                                                                      \
    X(IQ3_S, 21)                                                                                                       \
    X(IQ3_XXS, 18)                                                                                                     \
    X(IQ2_S, 22)                                                                                                       \
    X(IQ2_XS, 17)                                                                                                      \
    X(IQ2_XXS, 16)                                                                                                     \
    X(IQ1_M, 29)                                                                                                       \
    X(IQ1_S, 19)                                                                                                       \
    X(TQ1_0, 34)                                                                                                       \
    X(TQ2_0, 35)                                                                                                       \
    X(MXFP4, 39)                                                                                                       \
    X(NVFP4, 40)                                                                                                       \
    X(Q1_0, 41)                                                                                                        \
    X(Q2_0, 42)

enum et_ggml_id {
#define ET_GGML_ID(name, id) ET_GGML_##name = id,
    ET_GGML_TYPES(ET_GGML_ID)
#undef ET_GGML_ID
};

/* `struct ggml_type_traits`, the facts of one type. */
struct et_ggml_traits {
    const char *name;
    int64_t block_size;
    int64_t interleave; /* not used */
    size_t block_bytes;
    bool quantized;                                              /* not used */
    void (*to_float)(const void *blocks, float *out, int64_t k); /* NULL for f32 */
    void (*from_float)(const float *rows, void *out, int64_t k); /* not used */
};

/* Called with a message before libggml ends the process. */
typedef void (*et_ggml_abort_fn)(const char *message);

/* The functions, X(returned type, name after "ggml_", parameters). `id` is the C type of a storage type's id: in
 * libggml an enumeration, which GCC and Clang pass as they pass an int. */
#define ET_GGML_FUNCTIONS(X, id, traits)                                                                               \
    X(size_t, quantize_chunk,                                                                                          \
      (id type, const float *rows, void *out, int64_t start, int64_t n, int64_t k, const float *weights))              \
    X(void, quantize_init, (id type))                                                                                  \
    X(bool, quantize_requires_imatrix, (id type))                                                                      \
    X(size_t, row_size, (id type, int64_t k))                                                                          \
    X(int64_t, blck_size, (id type))                                                                                   \
    X(const traits *, get_type_traits, (id type))                                                                      \
    X(const char *, version, (void))                                                                                   \
    X(et_ggml_abort_fn, set_abort_callback, (et_ggml_abort_fn callback))

#endif
