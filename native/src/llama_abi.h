/* The part of llama.cpp's C interface that llama_bridge.c uses, declared here so that edgetune compiles without its
 * headers: libllama is opened at run time. tests/test_llama_abi.c holds these declarations against the installed
 * header.
 */
#ifndef EDGETUNE_LLAMA_ABI_H
#define EDGETUNE_LLAMA_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* `struct llama_batch`: passed by value. */
struct et_llama_batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd; /* not used: NULL */
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
};

/* `llama_token_data` and `llama_token_data_array`: what a sampler chooses from. */
struct et_llama_candidate {
    int32_t id;
    float logit;
    float p;
};

struct et_llama_candidates {
    struct et_llama_candidate *data;
    size_t size;
    int64_t selected; /* an index of data */
    bool sorted;
};

/* What llama_decode returns. */
enum et_llama_status { ET_LLAMA_OK = 0, ET_LLAMA_NO_ROOM = 1, ET_LLAMA_ABORTED = 2 };

/* The functions, X(returned type, name after "llama_", parameters). The types of llama.cpp are parameters, so that a
 * test can put its own there. */
#define ET_LLAMA_FUNCTIONS(X, context, memory, vocab, sampler, batch, candidates)                                      \
    X(int32_t, decode, (context * ctx, batch tokens))                                                                  \
    X(float *, get_logits_ith, (context * ctx, int32_t index))                                                         \
    X(memory, get_memory, (const context *ctx))                                                                        \
    X(bool, memory_seq_rm, (memory mem, int32_t sequence, int32_t begin, int32_t end))                                 \
    X(int32_t, memory_seq_pos_min, (memory mem, int32_t sequence))                                                     \
    X(size_t, state_seq_get_size, (context * ctx, int32_t sequence))                                                   \
    X(size_t, state_seq_get_data, (context * ctx, uint8_t *out, size_t size, int32_t sequence))                        \
    X(size_t, state_seq_set_data, (context * ctx, const uint8_t *state, size_t size, int32_t sequence))                \
    X(void, sampler_apply, (sampler * chain, candidates * from))                                                       \
    X(void, sampler_accept, (sampler * chain, int32_t token))                                                          \
    X(int32_t, token_to_piece,                                                                                         \
      (const vocab *words, int32_t token, char *out, int32_t size, int32_t lstrip, bool special))

#endif
