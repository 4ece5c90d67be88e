/* A table of n-grams: the most frequent next token behind each of many short contexts. */
#ifndef EDGETUNE_LLAMA_NGRAMS_H
#define EDGETUNE_LLAMA_NGRAMS_H

#include <stdint.h>

/* A cell is 0 (empty), or from its highest bit on: 24 bits of the context's hash, 8 bits of the share of this next token
 * (255: always), 32 bits of the token. Collisions go to the next cell; some cells are empty. */
struct et_llama_ngrams {
    uint64_t *cells; /* [count] NULL: no table */
    uint32_t count;  /* a power of 2 */
    int32_t longest; /* tokens of a context, at most */
};

/* Returns the most frequent next token behind tokens[n], or -1; *share is how often it was that one, from 0 to 1. The
 * longest context that the table has decides. */
int32_t et_llama_ngrams_next(const struct et_llama_ngrams *table, const int32_t *tokens, int32_t n, float *share);

#endif
