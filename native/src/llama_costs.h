/* What batches of several rows cost, measured while answers are generated, and whether guessing tokens has paid so far. */
#ifndef EDGETUNE_LLAMA_COSTS_H
#define EDGETUNE_LLAMA_COSTS_H

#include "edgetune.h"

enum { ET_LLAMA_TIMED = 64 };

struct et_llama_costs {
    float assumed[ET_LLAMA_COSTS];    /* of 1, 2, 4, 8, 16, 32 rows, relative to one row */
    bool adapts;                      /* whether measured times go before the assumed ones */
    bool had_draft;                   /* the batch before */
    double usual[ET_LLAMA_TIMED + 1]; /* seconds of a batch by rows, an average; 0: none yet */
    int32_t count[ET_LLAMA_TIMED + 1];
    double change; /* seconds that a batch takes longer after one of another shape: llama.cpp builds its graph again */
    double spent, saved; /* seconds of batches of answers; those that guesses saved, negative if they cost some */
    int64_t batches;
};

/* Seconds that this thread has had a processor: the other threads of a batch work as long, and other processes do not count. */
double et_llama_clock(void);

/* The time of a batch of `rows` rows where `used` of them are no guesses, in a unit that depends on `used` alone. */
double et_llama_cost(const struct et_llama_costs *costs, int32_t used, int32_t rows);

/* Whether guesses have paid so far, but for a small share of the time, and what a batch without them costs is known. */
bool et_llama_may_draft(const struct et_llama_costs *costs, int32_t used);

/* Whether there is time to try batches of `rows` rows that seem not to pay, so that their cost is known. */
bool et_llama_may_try(const struct et_llama_costs *costs, int32_t used, int32_t rows);

/* Takes in a batch of answers: its seconds in llama.cpp, those with making the guesses, and how many tokens came of it. */
void et_llama_note(struct et_llama_costs *costs, int32_t used, int32_t rows, double decoded, double all,
                   int32_t tokens);

#endif
