/* What a loop of llama_slots.c knows of its sequences, for llama_drafts.c, which guesses how they go on. */
#ifndef EDGETUNE_LLAMA_SLOTS_H
#define EDGETUNE_LLAMA_SLOTS_H

#include "edgetune.h"
#include "llama_bridge.h"
#include "llama_costs.h"
#include "llama_ngrams.h"
#include "llama_sample.h"

#include <stdatomic.h>

enum {
    MAX_DRAFT = 15,
    SHORT_DRAFT = 3,
    LONG_DRAFT = 7, /* with the token before it: groups of 4 and 8 rows */
    PAUSE = 32,     /* tokens without a guess after too many wrong ones */
};

/* The share of a draft model's tokens that are right, before anything is known of a sequence. */
#define USUAL_SHARE 0.7f

struct slot {
    bool running;
    int32_t *tokens;  /* [room + 2 + MAX_DRAFT] prompt and answer */
    int32_t n_tokens; /* those that are certain; a draft comes after them */
    int32_t n_past;   /* those in the cache */
    int32_t take;     /* of the batch */
    int32_t n_draft;  /* of these, guessed ones */
    int32_t guessed, guessed_right, pause;
    int32_t most_drafted; /* tokens of a draft from the table or the draft model */
    int32_t n_foreseen;   /* tokens of such a draft in this turn */
    int32_t draft_past;   /* tokens in the cache of the draft model */
    bool asks_model;      /* whether the draft of this turn is the draft model's */
    bool is_repeated;     /* whether its next token was a near tie beside guesses: it is chosen again without */
    int32_t tied[2];      /* that token beside guesses and the second most likely one */
    float margin;         /* of the first over the second, in logits */
    float share;          /* of the draft model's tokens that were right lately */
    float expected[LONG_DRAFT + 1]; /* how many of its first tokens are likely to be right */
    int32_t first_row;              /* index in the batch of the first token with logits */
    int64_t order;                  /* of admission */
    struct et_llama_task task;
    bool has_mask;
    uint32_t *mask;                 /* [(v + 31) / 32] */
    struct et_llama_likely *likely; /* [(1 + MAX_DRAFT) * task.likely] */
};

struct et_llama_slots {
    struct et_llama_config config;
    void *memory;
    struct slot *slots; /* [n_slots] */
    int64_t admissions;
    int32_t last_served; /* with is_exact */
    struct et_llama_batch batch;
    int32_t *sequences; /* [n_batch] what batch.seq_id points to */
    atomic_int prompt_tokens_in_batch;
    struct et_llama_scratch scratch;
    struct et_llama_ngrams table;
    void *draft_context, *draft_memory; /* of the draft model, if there is one */
    struct et_llama_costs costs;
    int64_t n_drafted;
    float spread; /* the largest change of such a margin from a batch with guesses to one without */
    int32_t n_compared;
    struct et_llama_chosen *chosen; /* [n_slots * (1 + MAX_DRAFT)] */
    int32_t n_chosen;
};

static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* Tokens of a sequence that are not in the cache. */
static inline int32_t pending(const struct slot *own) { return own->n_tokens - own->n_past; }

static inline bool is_due(const struct slot *own, int32_t group) { return own->running && own->task.group == group; }

static inline bool is_answer(const struct slot *own, int32_t group) { return is_due(own, group) && pending(own) == 1; }

static inline bool may_draft(const struct slot *own) {
    return !own->pause && !own->is_repeated && !own->has_mask && !own->task.chain;
}

/* Chooses drafts of 0 to 7 tokens for the answers of a group, from the table and the draft model. */
void et_llama_draft_answers(struct et_llama_slots *s, int32_t group, int32_t used, int32_t budget);

/* Writes the tokens that followed the last earlier occurrence of the end of the sequence behind it; returns how many. */
int32_t et_llama_look_up(const struct et_llama_slots *s, struct slot *own, int32_t most);

/* Learns from how many tokens of the draft model were right. */
void et_llama_learn(struct slot *own, int32_t drafted, int32_t right);

#endif
