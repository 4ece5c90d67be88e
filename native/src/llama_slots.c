/* The loop of generation over libllama: batches of running answers and pieces of prompts, the next token of each
 * sequence, and its bytes. Of the logits there are only the rows that a batch gives, in llama.cpp's own memory.
 */
#include "llama_slots.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LOST_PREFIX = -1000, /* a status: what stands before the text had to be dropped with it */
    ROWS = 8,            /* pieces of prompts are multiples of it: the kernels take rows in groups of 4 and 8 */
    LONG_BATCH = 16,     /* tokens of prompts: ending a shorter batch early saves nothing */
    PATIENCE = 8,        /* tokens that are guessed before it counts how many of them were right */
    ENOUGH_COMPARED = 8, /* near ties */
};

/* A token whose logit is larger than all others by no more than this might be another one in a batch of other shape: at
 * first, until some tokens were evaluated in both, and then by how much the difference changed at most (docs/run.md). */
static const float FIRST_NEAR_TIE = 0.5f, SAFETY = 3;

/* The time of a batch by its rows, relative to a batch of one row, unless it is stated (et_llama_set_costs). */
static const float COSTS[ET_LLAMA_COSTS] = {1.0f, 1.4f, 1.8f, 3.0f, 5.0f, 9.0f};

/* --- life */

static bool allocate_batch(struct et_llama_slots *s) {
    size_t n = (size_t)s->config.n_batch;
    struct et_llama_batch *batch = &s->batch;
    batch->token = calloc(n, sizeof *batch->token);
    batch->pos = calloc(n, sizeof *batch->pos);
    batch->n_seq_id = calloc(n, sizeof *batch->n_seq_id);
    batch->seq_id = calloc(n, sizeof *batch->seq_id);
    batch->logits = calloc(n, sizeof *batch->logits);
    s->sequences = calloc(n, sizeof *s->sequences);
    if (!batch->token || !batch->pos || !batch->n_seq_id || !batch->seq_id || !batch->logits || !s->sequences)
        return false;
    for (size_t i = 0; i < n; i++) {
        batch->n_seq_id[i] = 1;
        batch->seq_id[i] = &s->sequences[i];
    }
    return true;
}

static bool allocate_slots(struct et_llama_slots *s) {
    size_t n = (size_t)s->config.n_slots, v = (size_t)s->config.v;
    s->slots = calloc(n, sizeof *s->slots);
    s->chosen = calloc(n * (1 + MAX_DRAFT), sizeof *s->chosen);
    s->scratch.candidates = malloc(v * sizeof *s->scratch.candidates);
    s->scratch.heap = malloc((v / ET_LLAMA_GROUP + 1) * sizeof *s->scratch.heap);
    if (!s->slots || !s->chosen || !s->scratch.candidates || !s->scratch.heap)
        return false;
    for (size_t i = 0; i < n; i++) {
        s->slots[i].tokens = malloc(((size_t)s->config.room + 2 + MAX_DRAFT) * sizeof(int32_t));
        s->slots[i].mask = malloc((v + 31) / 32 * sizeof(uint32_t));
        if (!s->slots[i].tokens || !s->slots[i].mask)
            return false;
    }
    return true;
}

struct et_llama_slots *et_llama_new(const struct et_llama_config *config) {
    struct et_llama_slots *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->config = *config;
    s->scratch.v = config->v;
    memcpy(s->costs.assumed, COSTS, sizeof COSTS);
    s->last_served = -1;
    atomic_init(&s->prompt_tokens_in_batch, 0);
    if (!allocate_batch(s) || !allocate_slots(s)) {
        et_llama_free(s);
        return NULL;
    }
    s->memory = et_llama.get_memory(config->context);
    return s;
}

void et_llama_free(struct et_llama_slots *s) {
    if (!s)
        return;
    for (int32_t i = 0; s->slots && i < s->config.n_slots; i++) {
        free(s->slots[i].tokens);
        free(s->slots[i].mask);
        free(s->slots[i].likely);
    }
    free(s->slots), free(s->chosen), free(s->scratch.candidates), free(s->scratch.heap);
    free(s->batch.token), free(s->batch.pos), free(s->batch.n_seq_id), free(s->batch.seq_id), free(s->batch.logits);
    free(s->sequences), free(s->table.cells);
    free(s);
}

bool et_llama_set_table(struct et_llama_slots *s, const uint64_t *cells, uint32_t count, int32_t longest) {
    uint64_t *copy = malloc((size_t)count * sizeof *copy);
    if (!copy)
        return false;
    memcpy(copy, cells, (size_t)count * sizeof *copy);
    free(s->table.cells);
    s->table = (struct et_llama_ngrams){.cells = copy, .count = count, .longest = longest};
    return true;
}

void et_llama_set_draft_model(struct et_llama_slots *s, void *context) {
    s->draft_context = context;
    s->draft_memory = et_llama.get_memory(context);
}

void et_llama_set_costs(struct et_llama_slots *s, const float *costs, bool adapts) {
    memcpy(s->costs.assumed, costs, sizeof s->costs.assumed);
    s->costs.adapts = adapts;
}

int64_t et_llama_drafted(const struct et_llama_slots *s) { return s->n_drafted; }

void et_llama_draft(struct et_llama_slots *s, int32_t slot, int32_t most) { s->slots[slot].most_drafted = most; }

/* --- sequences */

static int32_t common(const int32_t *a, const int32_t *b, int32_t most) {
    int32_t count = 0;
    while (count < most && a[count] == b[count])
        count++;
    return count;
}

int32_t et_llama_match(const struct et_llama_slots *s, int32_t slot, const int32_t *ids, int32_t n) {
    const struct slot *own = &s->slots[slot];
    return common(own->tokens, ids, smaller(n, own->n_past));
}

bool et_llama_is_running(const struct et_llama_slots *s, int32_t slot) { return s->slots[slot].running; }

bool et_llama_has_prompts(const struct et_llama_slots *s) {
    for (int32_t i = 0; i < s->config.n_slots; i++)
        if (s->slots[i].running && s->slots[i].n_tokens - s->slots[i].n_past > 1)
            return true;
    return false;
}

/* Drops what the cache of a sequence has from its token n_past on. Memory of another kind than keys and values cannot
 * be cut, and windows of attention cannot be filled again: then all of it goes. False: the prefix went with it. */
static bool cut(struct et_llama_slots *s, int32_t slot) {
    struct slot *own = &s->slots[slot];
    int32_t end = s->config.offset + own->n_past;
    if (et_llama.memory_seq_rm(s->memory, slot, end, -1) &&
        (end == 0 || et_llama.memory_seq_pos_min(s->memory, slot) == 0))
        return true;
    et_llama.memory_seq_rm(s->memory, slot, -1, -1);
    own->n_past = 0;
    return s->config.offset == 0;
}

int32_t et_llama_start(struct et_llama_slots *s, int32_t slot, const struct et_llama_task *task) {
    struct slot *own = &s->slots[slot];
    own->task = *task;
    own->task.ids = NULL;
    if (own->task.draft > MAX_DRAFT)
        own->task.draft = MAX_DRAFT;
    free(own->likely);
    own->likely = NULL;
    if (task->likely > 0) {
        own->likely = malloc((size_t)task->likely * (1 + MAX_DRAFT) * sizeof *own->likely);
        if (!own->likely)
            return -1;
    }
    own->n_past = task->kept;
    bool has_prefix = cut(s, slot);
    own->draft_past = common(own->tokens, task->ids, smaller(own->draft_past, task->n));
    own->share = USUAL_SHARE;
    memcpy(own->tokens, task->ids, (size_t)task->n * sizeof *own->tokens);
    own->n_tokens = task->n;
    if (!has_prefix)
        return LOST_PREFIX;
    own->has_mask = false;
    own->guessed = own->guessed_right = own->pause = own->most_drafted = 0;
    own->is_repeated = false;
    own->order = s->admissions++;
    own->running = true;
    return own->n_past;
}

bool et_llama_copy(struct et_llama_slots *s, int32_t from, int32_t to) {
    size_t size = et_llama.state_seq_get_size(s->config.context, from);
    uint8_t *state = malloc(size ? size : 1);
    if (!state)
        return false;
    size_t written = et_llama.state_seq_get_data(s->config.context, state, size, from);
    bool is_done = written > 0 && et_llama.state_seq_set_data(s->config.context, state, written, to) > 0;
    free(state);
    s->slots[to].n_past = s->slots[to].n_tokens = is_done ? s->slots[from].n_past : 0;
    s->slots[to].draft_past =
        common(s->slots[to].tokens, s->slots[from].tokens, smaller(s->slots[to].draft_past, s->slots[to].n_past));
    memcpy(s->slots[to].tokens, s->slots[from].tokens, (size_t)s->slots[to].n_past * sizeof(int32_t));
    return is_done;
}

void et_llama_mask(struct et_llama_slots *s, int32_t slot, const uint32_t *mask) {
    s->slots[slot].has_mask = mask != NULL;
    if (mask)
        memcpy(s->slots[slot].mask, mask, (size_t)((s->config.v + 31) / 32) * sizeof *mask);
}

void et_llama_stop(struct et_llama_slots *s, int32_t slot) {
    struct slot *own = &s->slots[slot];
    own->running = false;
    own->n_tokens = own->n_past;
    own->draft_past = smaller(own->draft_past, own->n_past);
}

void et_llama_interrupt(struct et_llama_slots *s) {
    if (atomic_load(&s->prompt_tokens_in_batch) >= LONG_BATCH)
        *s->config.stop = 1;
}

/* --- a batch */

/* Takes one sequence, the next one in turn. */
static void take_one(struct et_llama_slots *s, int32_t group) {
    for (int32_t i = 1; i <= s->config.n_slots; i++) {
        int32_t slot = (s->last_served + i) % s->config.n_slots;
        if (is_due(&s->slots[slot], group)) {
            s->slots[slot].take = smaller(pending(&s->slots[slot]), s->config.n_batch);
            s->last_served = slot;
            return;
        }
    }
}

static struct slot *oldest_prompt(struct et_llama_slots *s, int32_t group) {
    struct slot *found = NULL;
    for (int32_t i = 0; i < s->config.n_slots; i++) {
        struct slot *own = &s->slots[i];
        if (is_due(own, group) && !own->take && pending(own) > 1 && (!found || own->order < found->order))
            found = own;
    }
    return found;
}

/* Decides how many tokens of each sequence the batch has: first those of running answers, then prompts by age. Returns
 * the number of running answers. */
static int32_t take(struct et_llama_slots *s, int32_t group) {
    for (int32_t i = 0; i < s->config.n_slots; i++)
        s->slots[i].take = s->slots[i].n_draft = 0;
    if (s->config.is_exact) {
        take_one(s, group);
        return 0;
    }
    int32_t used = 0;
    for (int32_t i = 0; i < s->config.n_slots; i++)
        used += is_answer(&s->slots[i], group);
    int32_t budget = s->config.n_batch - used;
    bool is_paying = et_llama_may_draft(&s->costs, used);
    if (is_paying)
        et_llama_draft_answers(s, group, used, budget);
    for (int32_t i = 0; i < s->config.n_slots; i++) {
        struct slot *own = &s->slots[i];
        if (!is_answer(own, group))
            continue;
        if (!own->n_draft && is_paying && may_draft(own))
            own->n_draft = et_llama_look_up(s, own, smaller(own->task.draft, budget));
        own->pause -= own->pause > 0;
        own->take = 1 + own->n_draft;
        budget -= own->n_draft;
    }
    if (used)
        budget = smaller(budget, s->config.piece);
    for (struct slot *own; budget > 0 && (own = oldest_prompt(s, group));) {
        own->take = smaller(pending(own), budget);
        if (own->take < pending(own) && own->take > ROWS)
            own->take -= own->take % ROWS;
        budget -= own->take;
    }
    return used;
}

/* Fills the batch, in the order of sequences: caches of their own are only then evaluated together. Returns how many of
 * its tokens are of prompts. */
static int32_t fill(struct et_llama_slots *s) {
    struct et_llama_batch *batch = &s->batch;
    int32_t n = 0, of_prompts = 0;
    for (int32_t slot = 0; slot < s->config.n_slots; slot++) {
        struct slot *own = &s->slots[slot];
        if (!own->take)
            continue;
        int32_t end = own->n_past + own->take, first_output = own->n_tokens - 1;
        of_prompts += pending(own) > 1 ? own->take : 0;
        for (int32_t at = own->n_past; at < end; at++, n++) {
            if (at == first_output)
                own->first_row = n;
            batch->token[n] = own->tokens[at];
            batch->pos[n] = s->config.offset + at;
            batch->logits[n] = at >= first_output;
            s->sequences[n] = slot;
        }
    }
    batch->n_tokens = n;
    return of_prompts;
}

/* --- the next tokens */

/* Whether a token that was chosen beside guesses might be another one without; remembers what it is compared with. */
static bool is_near_tie(const struct et_llama_slots *s, struct slot *own, const float *logits, int32_t token) {
    own->tied[0] = token;
    own->tied[1] = et_llama_runner_up(logits, s->config.v, token);
    own->margin = logits[own->tied[0]] - logits[own->tied[1]];
    return own->margin <= (s->n_compared < ENOUGH_COMPARED ? FIRST_NEAR_TIE : SAFETY * s->spread);
}

/* Compares the logits of a near tie with those that it had beside guesses. */
static void compare_shapes(struct et_llama_slots *s, const struct slot *own, const float *logits) {
    float change = fabsf(logits[own->tied[0]] - logits[own->tied[1]] - own->margin);
    s->spread = change > s->spread ? change : s->spread;
    s->n_compared += s->n_compared < ENOUGH_COMPARED;
}

static void emit(struct et_llama_slots *s, int32_t slot, int32_t token, const float *logits, int32_t number) {
    struct slot *own = &s->slots[slot];
    struct et_llama_chosen *chosen = &s->chosen[s->n_chosen++];
    chosen->slot = slot;
    chosen->token = token;
    chosen->piece_size =
        et_llama.token_to_piece(s->config.vocab, token, chosen->piece, (int32_t)sizeof chosen->piece, 0, false);
    chosen->was_guessed = number < own->n_draft && own->tokens[own->n_tokens] == token;
    chosen->is_near_tie = own->is_repeated;
    own->is_repeated = false;
    chosen->n_likely = own->task.likely;
    if (own->task.likely < 0)
        return;
    double log_sum = et_llama_log_sum(logits, s->config.v);
    chosen->logprob = (double)logits[token] - log_sum;
    chosen->likely = own->likely ? own->likely + (ptrdiff_t)number * own->task.likely : NULL;
    et_llama_most_likely(logits, s->config.v, log_sum, chosen->likely, own->task.likely);
}

/* Chooses the token after each row of logits, as long as the draft was right, and no further than a near tie: that is
 * evaluated again without guesses, so that the answer is that without them. False: the prefix is lost. */
static bool advance(struct et_llama_slots *s, int32_t slot) {
    struct slot *own = &s->slots[slot];
    bool has_output = own->n_past + own->take >= own->n_tokens;
    int32_t drafted = own->n_draft, right = 0;
    if (!has_output) {
        own->n_past += own->take;
        return true;
    }
    for (int32_t number = 0; number <= drafted; number++) {
        const float *logits = et_llama.get_logits_ith(s->config.context, own->first_row + number);
        int32_t token =
            et_llama_choose(&s->scratch, logits, own->task.chain, own->has_mask ? own->mask : NULL, own->task.top_k);
        if (drafted && is_near_tie(s, own, logits, token)) {
            own->is_repeated = true;
            break;
        }
        if (own->is_repeated)
            compare_shapes(s, own, logits);
        emit(s, slot, token, logits, number);
        own->tokens[own->n_tokens++] = token;
        if (!s->chosen[s->n_chosen - 1].was_guessed)
            break;
        right++;
    }
    own->n_past = own->n_tokens - 1;
    own->draft_past = smaller(own->draft_past, own->n_past);
    et_llama_learn(own, drafted, right);
    own->guessed += drafted;
    own->guessed_right += right;
    if (own->guessed >= PATIENCE) {
        own->pause = own->guessed_right * 4 < own->guessed ? PAUSE : 0;
        own->guessed = own->guessed_right = 0;
    }
    s->n_drafted += drafted;
    return drafted == 0 || cut(s, slot);
}

struct et_llama_turn et_llama_turn(struct et_llama_slots *s, int32_t group) {
    s->n_chosen = 0;
    struct et_llama_turn turn = {.status = ET_LLAMA_OK, .count = 0, .chosen = s->chosen};
    double began = et_llama_clock();
    int32_t used = take(s, group), of_prompts = fill(s);
    if (s->batch.n_tokens == 0)
        return turn;
    atomic_store(&s->prompt_tokens_in_batch, of_prompts);
    double filled = et_llama_clock();
    turn.status = et_llama.decode(s->config.context, s->batch);
    double decoded = et_llama_clock();
    atomic_store(&s->prompt_tokens_in_batch, 0);
    for (int32_t slot = 0; slot < s->config.n_slots; slot++) {
        if (!s->slots[slot].take)
            continue;
        if (!(turn.status == ET_LLAMA_OK ? advance(s, slot) : cut(s, slot)))
            turn.status = LOST_PREFIX;
    }
    turn.count = turn.status == ET_LLAMA_OK ? s->n_chosen : 0;
    if (used && !of_prompts && turn.status == ET_LLAMA_OK)
        et_llama_note(&s->costs, used, s->batch.n_tokens, decoded - filled, decoded - began, s->n_chosen);
    return turn;
}
