#include "llama_ngrams.h"

enum { LONGEST_CONTEXT = 16 };

/* The hash of a context one token longer, at its beginning; edgetune/runtime/ngrams.py has the same. */
static uint64_t extended(uint64_t hash, int32_t token) {
    hash = (hash ^ (uint32_t)token) * 0xff51afd7ed558ccdULL;
    return hash ^ hash >> 32;
}

static uint64_t find(const struct et_llama_ngrams *table, uint64_t hash) {
    uint64_t mark = hash >> 40 ? hash >> 40 : 1;
    for (uint32_t i = 0; i < table->count; i++) {
        uint64_t cell = table->cells[(hash + i) & (table->count - 1)];
        if (cell == 0 || cell >> 40 == mark)
            return cell;
    }
    return 0;
}

int32_t et_llama_ngrams_next(const struct et_llama_ngrams *table, const int32_t *tokens, int32_t n, float *share) {
    uint64_t hashes[LONGEST_CONTEXT], hash = 0x9e3779b97f4a7c15ULL;
    int32_t longest = table->longest < LONGEST_CONTEXT ? table->longest : LONGEST_CONTEXT;
    longest = n < longest ? n : longest;
    for (int32_t i = 0; i < longest; i++)
        hashes[i] = hash = extended(hash, tokens[n - 1 - i]);
    for (int32_t i = longest - 1; i >= 0; i--) {
        uint64_t cell = find(table, hashes[i]);
        if (cell) {
            *share = (float)(cell >> 32 & 255) / 255;
            return (int32_t)(cell & 0xffffffff);
        }
    }
    return -1;
}
