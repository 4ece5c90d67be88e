/* The next token of a sequence from a row of logits. */
#ifndef EDGETUNE_LLAMA_SAMPLE_H
#define EDGETUNE_LLAMA_SAMPLE_H

#include "edgetune.h"
#include "llama_abi.h"

/* Scratch memory for rows of v logits. */
struct et_llama_scratch {
    int64_t v;
    struct et_llama_candidate *candidates; /* [v] */
    float *heap;                           /* [v / ET_LLAMA_GROUP + 1] */
};

enum { ET_LLAMA_GROUP = 64 };

/* Returns the token that a chain of llama.cpp chooses; NULL: the most likely one, the lowest id of equal ones.
 * mask: a bit for each permitted token, or NULL. top_k: if it is above 0, the chain begins with top-k of as many. */
int32_t et_llama_choose(struct et_llama_scratch *scratch, const float *logits, void *chain, const uint32_t *mask,
                        int32_t top_k);

/* The most likely token but for one. */
int32_t et_llama_runner_up(const float *logits, int64_t v, int32_t token);

/* log(sum(exp(logits[v]))). */
double et_llama_log_sum(const float *logits, int64_t v);

/* The `count` most likely tokens, the most likely first and the lowest id of equal ones; log-probabilities are relative
 * to log_sum. count <= v. */
void et_llama_most_likely(const float *logits, int64_t v, double log_sum, struct et_llama_likely *out, int count);

#endif
