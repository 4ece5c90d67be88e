/* The loop of generation over libllama: batches of running answers and pieces of prompts, the next token of each
 * sequence, and its bytes. Of the logits there are only the rows that a batch gives, in llama.cpp's own memory.
 */
#include "edgetune.h"
#include "llama_bridge.h"
#include "llama_ngrams.h"
#include "llama_sample.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_DRAFT = 15,
    LOST_PREFIX = -1000, /* a status: what stands before the text had to be dropped with it */
    ROWS = 8,            /* pieces of prompts are multiples of it: the kernels take rows in groups of 4 and 8 */
    LONG_BATCH = 16,     /* tokens of prompts: ending a shorter batch early saves nothing */
    LONGEST_MATCH = 4,   /* last tokens whose earlier occurrence gives a draft, and fewer down to: */
    SHORTEST_MATCH = 2,
    PATIENCE = 8, /* tokens that are guessed before it counts how many of them were right */
    PAUSE = 32,   /* tokens without a guess after too many wrong ones */
    SHORT_DRAFT = 3,
    LONG_DRAFT = 7, /* with the token before it: groups of 4 and 8 rows */
};

/* A token whose logit is larger than all others by no more than this might be another one in a batch of other shape. */
static const float NEAR_TIE = 0.1f;

/* The share of a draft model's tokens that are right, before anything is known of a sequence, and the least to go on. */
static const float USUAL_SHARE = 0.7f, LEAST_SHARE = 0.5f;

/* The time of a batch by its rows, relative to a batch of one row, unless it was measured (et_llama_set_costs). */
static const float COSTS[ET_LLAMA_COSTS] = {1.0f, 1.4f, 1.8f, 3.0f, 5.0f, 9.0f};

struct slot {
    bool running;
    int32_t *tokens;  /* [room + 2 + MAX_DRAFT] prompt and answer */
    int32_t n_tokens; /* those that are certain; a draft comes after them */
    int32_t n_past;   /* those in the cache */
    int32_t take;     /* of the batch */
    int32_t n_draft;  /* of these, guessed ones */
    int32_t guessed, guessed_right, pause;
    int32_t most_drafted;           /* tokens of a draft from the table or the draft model */
    int32_t n_foreseen;             /* tokens of such a draft in this turn */
    int32_t draft_past;             /* tokens in the cache of the draft model */
    bool asks_model;                /* whether the draft of this turn is the draft model's */
    float share;                    /* of the draft model's tokens that were right lately */
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
    float costs[ET_LLAMA_COSTS];
    int64_t n_drafted;
    struct et_llama_chosen *chosen; /* [n_slots * (1 + MAX_DRAFT)] */
    int32_t n_chosen;
};

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
    memcpy(s->costs, COSTS, sizeof s->costs);
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

void et_llama_set_costs(struct et_llama_slots *s, const float *costs) { memcpy(s->costs, costs, sizeof s->costs); }

int64_t et_llama_drafted(const struct et_llama_slots *s) { return s->n_drafted; }

void et_llama_draft(struct et_llama_slots *s, int32_t slot, int32_t most) { s->slots[slot].most_drafted = most; }

/* --- sequences */

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

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

static int32_t pending(const struct slot *own) { return own->n_tokens - own->n_past; }

/* Writes the tokens that followed the last earlier occurrence of the end of the sequence behind it; returns how many. */
static int32_t guess(struct et_llama_slots *s, struct slot *own, int32_t most) {
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

static bool is_due(const struct slot *own, int32_t group) { return own->running && own->task.group == group; }

static bool is_answer(const struct slot *own, int32_t group) { return is_due(own, group) && pending(own) == 1; }

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

/* The time of a batch of so many rows, relative to a batch of one row: between the measured ones by interpolation. */
static float cost(const struct et_llama_slots *s, int32_t rows) {
    int32_t i = 0;
    while (i < ET_LLAMA_COSTS - 2 && rows > 2 << i)
        i++;
    float from = (float)(1 << i);
    return s->costs[i] + (s->costs[i + 1] - s->costs[i]) * ((float)rows - from) / from;
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

/* Chooses drafts of 0 to 7 tokens: those that give the most tokens for the time of the batch. */
static void draft(struct et_llama_slots *s, int32_t group, int32_t used, int32_t budget) {
    for (int32_t i = 0; i < s->config.n_slots; i++) {
        struct slot *own = &s->slots[i];
        own->n_foreseen = 0;
        own->asks_model = false;
        if (!is_answer(own, group) || own->most_drafted <= 0 || own->pause || own->has_mask || own->task.chain)
            continue;
        if (s->table.cells)
            foresee(s, own);
        if (s->draft_context && !is_worth(own, SHORT_DRAFT))
            expect(s, own);
    }
    if (s->draft_context)
        draft_with_model(s);
    int32_t best = 0;
    float best_rate = (float)used / cost(s, used);
    for (int32_t length = 1; length <= LONG_DRAFT; length++) {
        int32_t rows = used;
        float tokens = (float)used;
        for (int32_t i = 0; i < s->config.n_slots; i++)
            if (is_worth(&s->slots[i], length)) {
                rows += smaller(length, s->slots[i].n_foreseen);
                tokens += s->slots[i].expected[smaller(length, s->slots[i].n_foreseen)];
            }
        if (rows - used <= budget && tokens / cost(s, rows) > best_rate)
            best = length, best_rate = tokens / cost(s, rows);
    }
    for (int32_t i = 0; best && i < s->config.n_slots; i++)
        if (is_worth(&s->slots[i], best))
            s->slots[i].n_draft = smaller(best, s->slots[i].n_foreseen);
}

/* Decides how many tokens of each sequence the batch has: first those of running answers, then prompts by age. */
static void take(struct et_llama_slots *s, int32_t group) {
    for (int32_t i = 0; i < s->config.n_slots; i++)
        s->slots[i].take = s->slots[i].n_draft = 0;
    if (s->config.is_exact) {
        take_one(s, group);
        return;
    }
    int32_t used = 0;
    for (int32_t i = 0; i < s->config.n_slots; i++)
        used += is_answer(&s->slots[i], group);
    int32_t budget = s->config.n_batch - used;
    draft(s, group, used, budget);
    for (int32_t i = 0; i < s->config.n_slots; i++) {
        struct slot *own = &s->slots[i];
        if (!is_answer(own, group))
            continue;
        if (!own->n_draft && !own->pause && !own->has_mask && !own->task.chain)
            own->n_draft = guess(s, own, smaller(own->task.draft, budget));
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

static bool is_near_tie(const float *logits, int64_t v, int32_t token) {
    float bound = logits[token] - NEAR_TIE;
    int32_t count = 0;
    for (int64_t id = 0; id < v; id++)
        count += logits[id] >= bound;
    return count > 1;
}

static void emit(struct et_llama_slots *s, int32_t slot, int32_t token, const float *logits, int32_t number) {
    struct slot *own = &s->slots[slot];
    struct et_llama_chosen *chosen = &s->chosen[s->n_chosen++];
    chosen->slot = slot;
    chosen->token = token;
    chosen->piece_size =
        et_llama.token_to_piece(s->config.vocab, token, chosen->piece, (int32_t)sizeof chosen->piece, 0, false);
    chosen->was_guessed = number < own->n_draft && own->tokens[own->n_tokens] == token;
    chosen->is_near_tie = own->n_draft && is_near_tie(logits, s->config.v, token);
    chosen->n_likely = own->task.likely;
    if (own->task.likely < 0)
        return;
    double log_sum = et_llama_log_sum(logits, s->config.v);
    chosen->logprob = (double)logits[token] - log_sum;
    chosen->likely = own->likely ? own->likely + (ptrdiff_t)number * own->task.likely : NULL;
    et_llama_most_likely(logits, s->config.v, log_sum, chosen->likely, own->task.likely);
}

/* Learns from how many tokens of the draft model were right. */
static void learn(struct slot *own, int32_t drafted, int32_t right) {
    if (!own->asks_model || !drafted)
        return;
    for (int32_t i = 0; i < drafted && i <= right; i++)
        own->share += ((i < right ? 1 : 0) - own->share) / 8;
    if (own->share < LEAST_SHARE)
        own->share = USUAL_SHARE, own->pause = PAUSE;
}

/* Chooses the token after each row of logits, as long as the draft was right. False: the prefix is lost. */
static bool advance(struct et_llama_slots *s, int32_t slot) {
    struct slot *own = &s->slots[slot];
    bool has_output = own->n_past + own->take >= own->n_tokens;
    int32_t drafted = own->n_draft;
    if (!has_output) {
        own->n_past += own->take;
        return true;
    }
    for (int32_t number = 0; number <= drafted; number++) {
        const float *logits = et_llama.get_logits_ith(s->config.context, own->first_row + number);
        int32_t token =
            et_llama_choose(&s->scratch, logits, own->task.chain, own->has_mask ? own->mask : NULL, own->task.top_k);
        emit(s, slot, token, logits, number);
        own->tokens[own->n_tokens++] = token;
        if (!s->chosen[s->n_chosen - 1].was_guessed)
            break;
        own->guessed_right++;
    }
    int32_t right = own->n_tokens - own->n_past - own->take + drafted - 1;
    own->n_past = own->n_tokens - 1;
    own->draft_past = smaller(own->draft_past, own->n_past);
    learn(own, drafted, right);
    own->guessed += drafted;
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
    take(s, group);
    int32_t of_prompts = fill(s);
    if (s->batch.n_tokens == 0)
        return turn;
    atomic_store(&s->prompt_tokens_in_batch, of_prompts);
    turn.status = et_llama.decode(s->config.context, s->batch);
    atomic_store(&s->prompt_tokens_in_batch, 0);
    for (int32_t slot = 0; slot < s->config.n_slots; slot++) {
        if (!s->slots[slot].take)
            continue;
        if (!(turn.status == ET_LLAMA_OK ? advance(s, slot) : cut(s, slot)))
            turn.status = LOST_PREFIX;
    }
    turn.count = turn.status == ET_LLAMA_OK ? s->n_chosen : 0;
    return turn;
}
