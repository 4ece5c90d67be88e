/* Runs the loop of llama_slots.c under sanitizers, over functions that stand for libllama: a sequence is continued by a
 * rule, and the stand-in checks that its cache has exactly the tokens that the loop believes it has. Random requests
 * come, are stopped, interrupted and masked; each answer must be what the rule gives for its prompt alone.
 *
 *   test_llama
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "edgetune.h"
#include "llama_bridge.h"
#include "llama_costs.h"

enum { SLOTS = 5, ROOM = 90, V = 200, BATCH = 64, OFFSET = 3, CELLS = ROOM + OFFSET + 32 };

static int guessed_right = 0, near_ties = 0;

static int32_t below(int32_t bound) { return (int32_t)(random_bits() % (uint32_t)bound); }

/* --- the stand-in for libllama: its context has the tokens of each sequence */

static struct stand_in {
    int32_t tokens[SLOTS][CELLS], n[SLOTS];
    float *logits[BATCH]; /* [V] of exact size, so that reads beyond are found */
    bool can_cut, aborts;
    int applied, accepted;
} model, drafter;

/* The token that follows a sequence: few of them, so that there is something to guess. */
static int32_t next_token(const int32_t *tokens, int32_t n) {
    uint32_t hash = (uint32_t)(n > 1 ? tokens[n - 2] : 100 + OFFSET - 1) * 31u + (uint32_t)tokens[n - 1];
    return (int32_t)(hash * 2654435761u >> 7) % 7 + 20;
}

/* What the draft model takes for the next token: often the right one. */
static int32_t drafted_token(const int32_t *tokens, int32_t n) {
    return tokens[n - 1] == 22 ? 23 : next_token(tokens, n);
}

/* Whether the next token is a near tie: a batch with guesses then gives the other one, as rounding may. */
static bool is_tied(const int32_t *tokens, int32_t n) { return tokens[n - 1] == 24; }

static int32_t count_outputs(const struct et_llama_batch *batch, int32_t sequence) {
    int32_t count = 0;
    for (int32_t i = 0; i < batch->n_tokens; i++)
        count += batch->seq_id[i][0] == sequence && batch->logits[i];
    return count;
}

static int32_t stand_in_decode(void *context, struct et_llama_batch batch) {
    struct stand_in *own = context;
    if (own->aborts)
        batch.n_tokens = batch.n_tokens / 2; /* what has been evaluated stays in the memory */
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        int32_t sequence = batch.seq_id[i][0];
        CHECK(batch.n_seq_id[i] == 1 && sequence >= 0 && sequence < SLOTS && batch.embd == NULL);
        CHECK(batch.pos[i] == own->n[sequence] && batch.pos[i] < CELLS);
        CHECK(batch.token[i] >= 0 && batch.token[i] < V);
        own->tokens[sequence][own->n[sequence]++] = batch.token[i];
        if (!batch.logits[i])
            continue;
        own->logits[i] = realloc(own->logits[i], V * sizeof(float));
        for (int32_t id = 0; id < V; id++)
            own->logits[i][id] = (float)(id % 5) - 4;
        own->logits[i][own == &drafter ? drafted_token(own->tokens[sequence], own->n[sequence])
                                       : next_token(own->tokens[sequence], own->n[sequence])] = 9;
        if (own == &model && is_tied(own->tokens[sequence], own->n[sequence]))
            own->logits[i][18] = count_outputs(&batch, sequence) > 1 ? 9.1f : 8.9f;
    }
    return own->aborts ? ET_LLAMA_ABORTED : ET_LLAMA_OK;
}

static float *stand_in_get_logits_ith(void *context, int32_t index) {
    const struct stand_in *own = context;
    return own->logits[index];
}

static void *stand_in_get_memory(const void *context) { return (void *)(uintptr_t)context; }

static bool stand_in_memory_seq_rm(void *memory, int32_t sequence, int32_t begin, int32_t end) {
    struct stand_in *own = memory;
    CHECK(end == -1);
    if (begin > 0 && begin < own->n[sequence] && !own->can_cut)
        return false;
    int32_t first = begin < 0 ? 0 : begin;
    if (first < own->n[sequence])
        own->n[sequence] = first;
    return true;
}

static int32_t stand_in_memory_seq_pos_min(void *memory, int32_t sequence) {
    const struct stand_in *own = memory;
    return own->n[sequence] ? 0 : -1;
}

static size_t stand_in_state_seq_get_size(void *context, int32_t sequence) {
    const struct stand_in *own = context;
    return (size_t)own->n[sequence] * sizeof(int32_t);
}

static size_t stand_in_state_seq_get_data(void *context, uint8_t *out, size_t size, int32_t sequence) {
    struct stand_in *own = context;
    memcpy(out, own->tokens[sequence], size);
    return stand_in_state_seq_get_size(context, sequence);
}

static size_t stand_in_state_seq_set_data(void *context, const uint8_t *from, size_t size, int32_t sequence) {
    struct stand_in *own = context;
    memcpy(own->tokens[sequence], from, size);
    own->n[sequence] = (int32_t)(size / sizeof(int32_t));
    return size;
}

/* A chain that takes the smallest logit, to be told from the most likely token. */
static void stand_in_sampler_apply(void *chain, struct et_llama_candidates *from) {
    (void)chain;
    from->selected = 0;
    for (size_t i = 1; i < from->size; i++)
        if (from->data[i].logit < from->data[from->selected].logit)
            from->selected = (int64_t)i;
    model.applied++;
}

static void stand_in_sampler_accept(void *chain, int32_t token) {
    (void)chain;
    CHECK(token >= 0 && token < V);
    model.accepted++;
}

static int32_t stand_in_token_to_piece(const void *vocab, int32_t token, char *out, int32_t size, int32_t lstrip,
                                       bool special) {
    (void)vocab, (void)lstrip;
    CHECK(!special);
    if (token == 21)
        return -1000;
    return snprintf(out, (size_t)size, "%d ", token);
}

static void install(void) {
#define ET_LLAMA_INSTALL(returned, name, parameters) et_llama.name = stand_in_##name;
    ET_LLAMA_FUNCTIONS(ET_LLAMA_INSTALL, void, void *, void, void, struct et_llama_batch, struct et_llama_candidates)
#undef ET_LLAMA_INSTALL
}

/* --- a table of n-grams: some of it right, some wrong, some missing */

enum { TABLE = 256, MARK_BITS = 24 };

static void put_ngram(uint64_t *cells, const int32_t *last, int32_t n, int32_t token, uint64_t share) {
    uint64_t hash = 0x9e3779b97f4a7c15ULL;
    for (int32_t i = 0; i < n; i++) {
        hash = (hash ^ (uint32_t)last[i]) * 0xff51afd7ed558ccdULL;
        hash ^= hash >> 32;
    }
    uint64_t at = hash % TABLE, mark = hash >> (64 - MARK_BITS);
    while (cells[at])
        at = (at + 1) % TABLE;
    cells[at] = (mark ? mark : 1) << 40 | share << 32 | (uint32_t)token;
}

static void set_table(struct et_llama_slots *slots) {
    uint64_t *cells = calloc(TABLE, sizeof *cells); /* of exact size */
    for (int32_t a = 20; a < 27; a++)
        for (int32_t b = 20; b < 27; b++) {
            int32_t last[] = {b, a}, before[] = {a, b};
            if (below(4))
                put_ngram(cells, last, 2, below(5) ? next_token(before, 2) : below(V + 10), (uint64_t)below(256));
        }
    int32_t last = 24;
    put_ngram(cells, &last, 1, 25, 200);
    CHECK(et_llama_set_table(slots, cells, TABLE, 1 + below(20)));
    free(cells);
}

/* --- random requests */

struct answer {
    int32_t tokens[ROOM + 2], n_prompt, n, limit;
    bool is_running;
};

static void put_prefix(int32_t slot) {
    model.n[slot] = 0;
    for (int32_t i = 0; i < OFFSET; i++)
        model.tokens[slot][model.n[slot]++] = 100 + i;
}

static void begin(struct et_llama_slots *slots, int32_t slot, struct answer *answer, const struct answer *other) {
    answer->n_prompt = answer->n = 1 + below(ROOM - 1);
    for (int32_t i = 0; i < answer->n; i++)
        answer->tokens[i] = i < other->n && below(50) ? other->tokens[i] : below(V);
    answer->limit = 1 + below(40);
    int32_t *ids = malloc((size_t)answer->n * sizeof *ids); /* of exact size */
    memcpy(ids, answer->tokens, (size_t)answer->n * sizeof *ids);
    int32_t kept = et_llama_match(slots, slot, ids, answer->n);
    kept = kept < answer->n ? kept : answer->n - 1;
    struct et_llama_task task = {
        .ids = ids, .n = answer->n, .kept = kept, .likely = below(5) - 1, .draft = below(9), .group = slot % 2};
    int32_t found = et_llama_start(slots, slot, &task);
    if (found < -1) {
        put_prefix(slot);
        task.kept = 0;
        found = et_llama_start(slots, slot, &task);
    }
    CHECK(found >= 0 && found <= kept && et_llama_is_running(slots, slot));
    et_llama_draft(slots, slot, below(8));
    answer->is_running = true;
    free(ids);
}

static void check_chosen(const struct et_llama_chosen *chosen, struct answer *answer) {
    CHECK(chosen->token == next_token(answer->tokens, answer->n));
    CHECK(chosen->token == 21 ? chosen->piece_size == -1000
                              : chosen->piece_size == 3 && atoi(chosen->piece) == chosen->token);
    bool may_tie = is_tied(answer->tokens, answer->n);
    if (chosen->n_likely >= 0)
        CHECK(chosen->logprob < 0 && chosen->logprob > (may_tie ? -1 : -0.1));
    if (chosen->n_likely > 0)
        CHECK(chosen->likely[0].token == chosen->token && chosen->likely[0].logprob == chosen->logprob);
    for (int32_t i = 1; i < chosen->n_likely; i++)
        CHECK(chosen->likely[i].logprob <= chosen->likely[i - 1].logprob);
    answer->tokens[answer->n++] = chosen->token;
    guessed_right += chosen->was_guessed;
    near_ties += chosen->is_near_tie;
    CHECK(!chosen->is_near_tie || (may_tie && !chosen->was_guessed));
}

/* False: a prefix is lost, with which an engine gives up. */
static bool take_turn(struct et_llama_slots *slots, struct answer *answers, int32_t group) {
    model.aborts = below(10) == 0;
    drafter.aborts = below(20) == 0;
    struct et_llama_turn turn = et_llama_turn(slots, group);
    if (turn.status != ET_LLAMA_OK) {
        CHECK(turn.count == 0 && (turn.status == ET_LLAMA_ABORTED || !model.can_cut));
        return turn.status == ET_LLAMA_ABORTED;
    }
    for (int32_t i = 0; i < turn.count; i++) {
        struct answer *answer = &answers[turn.chosen[i].slot];
        CHECK(turn.chosen[i].slot % 2 == group);
        if (!answer->is_running)
            continue; /* it ended in the midst of a draft */
        check_chosen(&turn.chosen[i], answer);
        if (answer->n > ROOM || answer->n - answer->n_prompt >= answer->limit) {
            answer->is_running = false;
            et_llama_stop(slots, turn.chosen[i].slot);
        }
    }
    return true;
}

static void test_requests(bool is_exact, bool can_cut, int rounds, bool has_table, bool has_drafter) {
    memset(model.n, 0, sizeof model.n);
    memset(drafter.n, 0, sizeof drafter.n);
    model.can_cut = can_cut, drafter.can_cut = below(2);
    char stop = 0;
    struct et_llama_config config = {.context = &model,
                                     .vocab = NULL,
                                     .stop = &stop,
                                     .n_slots = SLOTS,
                                     .room = ROOM,
                                     .offset = OFFSET,
                                     .n_batch = BATCH,
                                     .piece = 20,
                                     .v = V,
                                     .is_exact = is_exact};
    struct et_llama_slots *slots = et_llama_new(&config);
    if (has_table && can_cut)
        set_table(slots);
    if (has_drafter && can_cut)
        et_llama_set_draft_model(slots, &drafter);
    struct answer answers[SLOTS] = {0};
    for (int32_t slot = 0; slot < SLOTS; slot++)
        put_prefix(slot);
    for (int round = 0; round < rounds; round++) {
        int32_t slot = below(SLOTS), other = below(SLOTS);
        if (answers[slot].is_running && below(40) == 0) {
            et_llama_stop(slots, slot);
            answers[slot].is_running = false;
        } else if (!answers[slot].is_running) {
            if (slot != other && below(3) == 0)
                CHECK(et_llama_copy(slots, other, slot) || model.n[other] == 0);
            begin(slots, slot, &answers[slot], &answers[other]);
        }
        et_llama_interrupt(slots);
        CHECK(stop == 0); /* nothing is being evaluated */
        if (!take_turn(slots, answers, round / 3 % 2))
            break;
    }
    et_llama_free(slots);
}

/* Batches of `rows` rows that take `seconds` and give `tokens`, as long as guesses are permitted; the share that they cost. */
static double cost_of_guesses(int32_t rows, double seconds, int32_t tokens) {
    struct et_llama_costs costs = {.assumed = {1, 1, 1, 1, 1, 1}, .adapts = true};
    double all = 0, without = 0;
    for (int round = 0; round < 50000; round++) {
        bool is_better = tokens / et_llama_cost(&costs, 1, rows) > 1 / et_llama_cost(&costs, 1, 1);
        bool guesses = et_llama_may_draft(&costs, 1) && (is_better || et_llama_may_try(&costs, 1, rows));
        double noise = random_bits() % 50 == 0 ? 20 : 0; /* another process ran */
        if (guesses)
            et_llama_note(&costs, 1, rows, seconds + noise, seconds + noise, tokens);
        else
            et_llama_note(&costs, 1, 1, 1 + noise, 1 + noise, 1);
        all += guesses ? seconds : 1;
        without += guesses ? tokens : 1;
    }
    return all / without - 1;
}

static void test_costs(void) {
    CHECK(cost_of_guesses(4, 3.4, 3) < 0.03 && cost_of_guesses(8, 9, 1) < 0.03);
    CHECK(cost_of_guesses(4, 1.3, 3) < -0.5); /* they pay */
    struct et_llama_costs costs = {.assumed = {1, 2, 4, 8, 16, 32}, .adapts = true};
    CHECK(!et_llama_may_try(&costs, 1, 4));
    for (int round = 0; round < 300; round++)
        et_llama_note(&costs, 1, 1, 1, 1, 1);
    CHECK(et_llama_may_try(&costs, 1, 4) && fabs(et_llama_cost(&costs, 1, 4) - 4) < 1e-9);
    for (int round = 0; round < 3; round++)
        et_llama_note(&costs, 1, 4, 1.5, 1.5, 2);
    CHECK(!et_llama_may_try(&costs, 1, 4) && fabs(et_llama_cost(&costs, 1, 4) - 1.5) < 1e-9);
    et_llama_note(&costs, 1, 1, 1.25, 1.25, 1);
    CHECK(et_llama_cost(&costs, 1, 4) > 1.7); /* with the graph that is built again */
    CHECK(et_llama_cost(&costs, 1, 3) > 3);
}

static void test_masks_and_chains(void) {
    memset(model.n, 0, sizeof model.n);
    model.can_cut = true, model.aborts = false;
    char stop = 0;
    struct et_llama_config config = {
        .context = &model, .stop = &stop, .n_slots = 2, .room = ROOM, .n_batch = BATCH, .piece = 20, .v = V};
    struct et_llama_slots *slots = et_llama_new(&config);
    int32_t ids[] = {1, 2, 3};
    int chain;
    struct et_llama_task greedy = {.ids = ids, .n = 3, .likely = -1}, sampled = greedy;
    sampled.chain = &chain, sampled.top_k = 2;
    CHECK(et_llama_start(slots, 0, &greedy) == 0 && et_llama_start(slots, 1, &sampled) == 0);
    uint32_t mask[(V + 31) / 32] = {0};
    mask[V / 32] = 1u << (V - 1) % 32; /* the last token */
    et_llama_mask(slots, 0, mask);
    struct et_llama_turn turn = et_llama_turn(slots, 0);
    CHECK(turn.count == 2 && turn.chosen[0].token == V - 1 && turn.chosen[1].token != next_token(ids, 3));
    CHECK(model.applied == 1 && model.accepted == 1);
    et_llama_mask(slots, 0, NULL);
    et_llama_mask(slots, 1, mask);
    int32_t longer[] = {1, 2, 3, V - 1};
    turn = et_llama_turn(slots, 0);
    CHECK(turn.count == 2 && turn.chosen[0].token == next_token(longer, 4) && turn.chosen[1].token == V - 1);
    CHECK(!et_llama_has_prompts(slots));
    et_llama_free(slots);
}

int main(void) {
    install();
    for (int i = 0; i < 40; i++)
        test_requests(i % 4 == 1, i % 5 != 2, 2000, i % 2 == 0, i % 3 == 0);
    test_masks_and_chains();
    test_costs();
    CHECK(guessed_right > 1000 && near_ties > 100);
    for (int i = 0; i < BATCH; i++)
        free(model.logits[i]), free(drafter.logits[i]);
    printf("test_llama: %d failures, %d tokens guessed right, %d near ties\n", failures, guessed_right, near_ties);
    return failures != 0;
}
