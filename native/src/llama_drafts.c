/* Guesses how sequences go on: from what followed the same tokens before, from a table of n-grams, by a draft model. */
#include "llama_slots.h"

#include <string.h>

enum {
    LONGEST_MATCH = 4, /* last tokens whose earlier occurrence gives a draft, and fewer down to: */
    SHORTEST_MATCH = 2,
};

/* The least share of a draft model's tokens that is right, to go on with it. */
static const float LEAST_SHARE = 0.5f;

/* What a batch of several rows costs where reading the weights is most of the work: enough for a trial. */
static const struct et_llama_costs HOPED = {.assumed = {1.0f, 1.1f, 1.3f, 1.9f, 3.5f, 6.5f}};

int32_t et_llama_look_up(const struct et_llama_slots *s, struct slot *own, int32_t most) {
    int32_t n = own->n_tokens, room = s->config.room - n;
    most = most < room ? most : room;
    for (int32_t length = LONGEST_MATCH; most > 0 && length >= SHORTEST_MATCH; length--)
        for (int32_t start = n - length - 1; start >= 0; start--) {
            if (memcmp(own->tokens + start, own->tokens + n - length, (size_t)length * sizeof *own->tokens) != 0)
                continue;
            int32_t after = start + length, count = n - after < most ? n - after : most;
            memmove(own->tokens + n, own->tokens + after, (size_t)count * sizeof *own->tokens);
            return count;
        }
    return 0;
}

/* Adds a token of a draft that is right with this probability, if those before it are. */
static void add_expected(struct slot *own, int32_t number, float *all_right, float share) {
    *all_right *= share;
    own->expected[number + 1] = own->expected[number] + *all_right;
}

/* Writes the draft of the table behind a sequence. */
static void foresee(struct et_llama_slots *s, struct slot *own) {
    int32_t n = own->n_tokens, most = smaller(own->most_drafted, s->config.room - n), count = 0;
    float share = 0, all_right = 1;
    for (; count < most; count++) {
        int32_t token = et_llama_ngrams_next(&s->table, own->tokens, n + count, &share);
        if (token < 0 || token >= s->config.v)
            break;
        own->tokens[n + count] = token;
        add_expected(own, count, &all_right, share);
    }
    own->n_foreseen = count;
}

/* Whether a draft of a length has enough in it for a sequence: a quarter of it. */
static bool is_worth(const struct slot *own, int32_t length) {
    length = smaller(length, own->n_foreseen);
    return length > 0 && 4 * own->expected[length] >= (float)length;
}

/* States what the draft model is likely to get right, before it is asked. */
static void expect(const struct et_llama_slots *s, struct slot *own) {
    float all_right = 1;
    own->n_foreseen = smaller(own->most_drafted, s->config.room - own->n_tokens);
    own->n_foreseen = smaller(own->n_foreseen, own->share > 0.85f ? LONG_DRAFT : SHORT_DRAFT);
    for (int32_t i = 0; i < own->n_foreseen; i++)
        add_expected(own, i, &all_right, own->share);
    own->asks_model = own->n_foreseen > 0;
}

/* Adds a token of a sequence to a batch for the draft model. */
static void add(struct et_llama_slots *s, int32_t slot, int32_t at, bool is_last) {
    struct et_llama_batch *batch = &s->batch;
    int32_t n = batch->n_tokens++;
    batch->token[n] = s->slots[slot].tokens[at];
    batch->pos[n] = at;
    batch->logits[n] = is_last;
    s->sequences[n] = slot;
    s->slots[slot].first_row = is_last ? n : -1;
}

/* Continues all sequences that ask the draft model by up to `wanted` tokens. False: it failed. */
static bool ask_model(struct et_llama_slots *s, int32_t wanted) {
    for (int32_t number = 0; number < wanted;) {
        bool has_all = true;
        s->batch.n_tokens = 0;
        for (int32_t slot = 0; slot < s->config.n_slots; slot++) {
            struct slot *own = &s->slots[slot];
            int32_t end = own->n_tokens + number;
            own->first_row = -1;
            if (!own->asks_model || number >= own->n_foreseen)
                continue;
            for (; own->draft_past < end && s->batch.n_tokens < s->config.n_batch; own->draft_past++)
                add(s, slot, own->draft_past, own->draft_past == end - 1);
            has_all = has_all && own->draft_past == end;
        }
        if (s->batch.n_tokens && et_llama.decode(s->draft_context, s->batch) != ET_LLAMA_OK)
            return false;
        for (int32_t slot = 0; slot < s->config.n_slots; slot++) {
            struct slot *own = &s->slots[slot];
            if (own->first_row >= 0)
                own->tokens[own->n_tokens + number] = et_llama_choose(
                    &s->scratch, et_llama.get_logits_ith(s->draft_context, own->first_row), NULL, NULL, 0);
        }
        number += has_all;
    }
    return true;
}

/* Writes the drafts of the draft model behind the sequences that ask it. */
static void draft_with_model(struct et_llama_slots *s) {
    int32_t wanted = 0;
    for (int32_t slot = 0; slot < s->config.n_slots; slot++) {
        struct slot *own = &s->slots[slot];
        if (!own->asks_model)
            continue;
        wanted = own->n_foreseen > wanted ? own->n_foreseen : wanted;
        own->draft_past = smaller(own->draft_past, own->n_tokens - 1);
        if (!et_llama.memory_seq_rm(s->draft_memory, slot, own->draft_past, -1) ||
            (own->draft_past && et_llama.memory_seq_pos_min(s->draft_memory, slot) != 0)) {
            et_llama.memory_seq_rm(s->draft_memory, slot, -1, -1);
            own->draft_past = 0;
        }
    }
    if (ask_model(s, wanted))
        return;
    for (int32_t slot = 0; slot < s->config.n_slots; slot++)
        if (s->slots[slot].asks_model) {
            et_llama.memory_seq_rm(s->draft_memory, slot, -1, -1);
            s->slots[slot].draft_past = s->slots[slot].n_foreseen = 0;
        }
}

/* What drafts of a length give, with the rows that they need: tokens that are likely to come of the batch. */
static float expect_tokens(const struct et_llama_slots *s, int32_t length, int32_t used, int32_t *rows) {
    float tokens = (float)used;
    *rows = used;
    for (int32_t i = 0; i < s->config.n_slots; i++)
        if (is_worth(&s->slots[i], length)) {
            *rows += smaller(length, s->slots[i].n_foreseen);
            tokens += s->slots[i].expected[smaller(length, s->slots[i].n_foreseen)];
        }
    return tokens;
}

/* The length of drafts that gives the most tokens for the time of the batch; 0: none. Where none pays as far as is
 * known, one that might is tried now and then. */
static int32_t best_length(const struct et_llama_slots *s, int32_t used, int32_t budget) {
    int32_t best = 0, tried = 0, rows;
    double best_rate = (double)used / et_llama_cost(&s->costs, used, used);
    for (int32_t length = 1; length <= LONG_DRAFT; length++) {
        double tokens = (double)expect_tokens(s, length, used, &rows),
               rate = tokens / et_llama_cost(&s->costs, used, rows);
        if (rows == used || rows - used > budget)
            continue;
        if (rate > best_rate)
            best = length, best_rate = rate;
        if (tokens / et_llama_cost(&HOPED, used, rows) > (double)used && et_llama_may_try(&s->costs, used, rows))
            tried = length;
    }
    return best ? best : tried;
}

void et_llama_draft_answers(struct et_llama_slots *s, int32_t group, int32_t used, int32_t budget) {
    for (int32_t i = 0; i < s->config.n_slots; i++) {
        struct slot *own = &s->slots[i];
        own->n_foreseen = 0;
        own->asks_model = false;
        if (!is_answer(own, group) || own->most_drafted <= 0 || !may_draft(own))
            continue;
        if (s->table.cells)
            foresee(s, own);
        if (s->draft_context && !is_worth(own, SHORT_DRAFT))
            expect(s, own);
    }
    if (s->draft_context)
        draft_with_model(s);
    int32_t best = used ? best_length(s, used, budget) : 0;
    for (int32_t i = 0; best && i < s->config.n_slots; i++)
        if (is_worth(&s->slots[i], best))
            s->slots[i].n_draft = smaller(best, s->slots[i].n_foreseen);
}

void et_llama_learn(struct slot *own, int32_t drafted, int32_t right) {
    if (!own->asks_model || !drafted)
        return;
    for (int32_t i = 0; i < drafted && i <= right; i++)
        own->share += ((i < right ? 1 : 0) - own->share) / 8;
    if (own->share < LEAST_SHARE)
        own->share = USUAL_SHARE, own->pause = PAUSE;
}
