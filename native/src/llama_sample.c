#include "llama_sample.h"

#include "compare_math.h"
#include "llama_bridge.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, BLOCK = 512 };

/* The largest of values[count]; -inf for none. The lanes are independent, so that the compiler makes vectors of them. */
static __attribute__((noinline)) float largest(const float *values, int64_t count) {
    float lanes[LANES];
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = -INFINITY;
    int64_t whole = count - count % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    float best = -INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        best = lanes[lane] > best ? lanes[lane] : best;
    for (int64_t i = whole; i < count; i++)
        best = values[i] > best ? values[i] : best;
    return best;
}

static bool permits(const uint32_t *mask, int64_t id) { return !mask || (mask[id >> 5] >> (id & 31) & 1); }

/* The first place of the largest of values[count], which is looked for in the block that has it; 0 for only NaN. */
static int64_t place_of_largest(const float *values, int64_t count) {
    float best = -INFINITY;
    int64_t begin = 0;
    for (int64_t at = 0; at < count; at += BLOCK) {
        float found = largest(values + at, count - at < BLOCK ? count - at : BLOCK);
        if (found > best)
            best = found, begin = at;
    }
    for (int64_t id = begin; id < count; id++)
        if (values[id] == best)
            return id;
    return 0;
}

static int32_t most_likely(const float *logits, int64_t v, const uint32_t *mask) {
    if (!mask)
        return (int32_t)place_of_largest(logits, v);
    int64_t chosen = -1;
    for (int64_t id = 0; id < v; id++)
        if (permits(mask, id) && (chosen < 0 || logits[id] > logits[chosen]))
            chosen = id;
    return chosen < 0 ? 0 : (int32_t)chosen;
}

int32_t et_llama_runner_up(const float *logits, int64_t v, int32_t token) {
    int64_t before = place_of_largest(logits, token);
    int64_t after = token + 1 + place_of_largest(logits + token + 1, v - token - 1);
    return (int32_t)(after >= v || (token > 0 && logits[before] >= logits[after]) ? before : after);
}

/* Moves the smallest of heap[count] to its beginning, given that only heap[0] is out of order. */
static void sink(float *heap, int64_t count) {
    for (int64_t at = 0;;) {
        int64_t child = 2 * at + 1;
        if (child >= count)
            return;
        if (child + 1 < count && heap[child + 1] < heap[child])
            child++;
        if (heap[at] <= heap[child])
            return;
        float value = heap[at];
        heap[at] = heap[child];
        heap[child] = value;
        at = child;
    }
}

/* A logit such that at least k logits are not below it: the k-th largest maximum of groups. -inf if there are too few
 * groups. At 128,000 tokens and k = 40 it leaves about a hundred candidates. */
static float safe_threshold(struct et_llama_scratch *scratch, const float *logits, int64_t k) {
    int64_t groups = scratch->v / ET_LLAMA_GROUP;
    if (k <= 0 || k >= groups)
        return -INFINITY;
    float *heap = scratch->heap;
    for (int64_t i = 0; i < k; i++)
        heap[i] = -INFINITY;
    for (int64_t group = 0; group < groups; group++) {
        float maximum = largest(logits + group * ET_LLAMA_GROUP, ET_LLAMA_GROUP);
        if (maximum > heap[0]) {
            heap[0] = maximum;
            sink(heap, k);
        }
    }
    return heap[0];
}

int32_t et_llama_choose(struct et_llama_scratch *scratch, const float *logits, void *chain, const uint32_t *mask,
                        int32_t top_k) {
    if (!chain)
        return most_likely(logits, scratch->v, mask);
    float threshold = mask ? -INFINITY : safe_threshold(scratch, logits, top_k);
    struct et_llama_candidates from = {.data = scratch->candidates, .size = 0, .selected = -1, .sorted = false};
    for (int64_t id = 0; id < scratch->v; id++)
        if (permits(mask, id) && logits[id] >= threshold)
            from.data[from.size++] = (struct et_llama_candidate){.id = (int32_t)id, .logit = logits[id], .p = 0};
    if (from.size == 0)
        return most_likely(logits, scratch->v, mask); /* only NaN */
    et_llama.sampler_apply(chain, &from);
    bool is_valid = from.selected >= 0 && (size_t)from.selected < from.size;
    int32_t token = is_valid ? from.data[from.selected].id : most_likely(logits, scratch->v, mask);
    et_llama.sampler_accept(chain, token);
    return token;
}

double et_llama_log_sum(const float *logits, int64_t v) {
    double maximum = (double)largest(logits, v), lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= v; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += mass((double)logits[i + lane] - maximum);
    for (int lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    for (; i < v; i++)
        sum += mass((double)logits[i] - maximum);
    return maximum + log(sum);
}

void et_llama_most_likely(const float *logits, int64_t v, double log_sum, struct et_llama_likely *out, int count) {
    int kept = 0;
    for (int64_t id = 0; count > 0 && id < v; id++) {
        double logprob = (double)logits[id] - log_sum;
        if (kept == count && !(logprob > out[kept - 1].logprob))
            continue;
        int at = kept < count ? kept++ : kept - 1;
        for (; at > 0 && logprob > out[at - 1].logprob; at--)
            out[at] = out[at - 1];
        out[at] = (struct et_llama_likely){.token = (int32_t)id, .logprob = logprob};
    }
}
