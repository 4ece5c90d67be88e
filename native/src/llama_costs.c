#include "llama_costs.h"

#include <string.h>
#include <time.h>

enum {
    TRIALS = 3,      /* of a number of rows, that are made although it seems not to pay */
    FIRST_TRY = 32,  /* batches before the first one */
    FORGET = 4096,   /* batches after which trials are made again: the machine may have become less busy */
    PERIOD = 64,     /* batches, of which two have no guesses, for comparison; the first builds the graph again */
    REMEMBERED = 16, /* batches over which times are averaged */
};

/* The share of the time that guesses may have cost: with it an engine is as fast as without guesses, within noise. */
static const double RISKED = 0.02;

double et_llama_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double smaller(double a, double b) { return a < b ? a : b; }

/* The assumed time, relative to that of one row: between the stated numbers of rows by interpolation. */
static double assumed(const struct et_llama_costs *costs, int32_t rows) {
    int32_t i = 0;
    while (i < ET_LLAMA_COSTS - 2 && rows > 2 << i)
        i++;
    double from = (double)(1 << i), below = (double)costs->assumed[i];
    return below + ((double)costs->assumed[i + 1] - below) * ((double)rows - from) / from;
}

static bool is_timed(const struct et_llama_costs *costs, int32_t rows) {
    return costs->adapts && rows <= ET_LLAMA_TIMED && costs->usual[rows] > 0;
}

double et_llama_cost(const struct et_llama_costs *costs, int32_t used, int32_t rows) {
    if (!is_timed(costs, used))
        return assumed(costs, rows);
    double change = rows == used || costs->change < 0 ? 0 : costs->change;
    if (is_timed(costs, rows))
        return costs->usual[rows] + change;
    return costs->usual[used] * assumed(costs, rows) / assumed(costs, used) + change;
}

bool et_llama_may_draft(const struct et_llama_costs *costs, int32_t used) {
    if (!costs->adapts)
        return true;
    return is_timed(costs, used) && costs->batches % PERIOD >= 2 && costs->saved >= -RISKED * costs->spent;
}

bool et_llama_may_try(const struct et_llama_costs *costs, int32_t used, int32_t rows) {
    if (!costs->adapts || rows > ET_LLAMA_TIMED || costs->count[rows] >= TRIALS || costs->batches < FIRST_TRY)
        return false;
    return costs->saved - et_llama_cost(costs, used, rows) >= -RISKED * costs->spent;
}

/* A batch in which another process ran counts as one of three times the usual. */
static double bounded(double usual, double seconds) { return usual == 0 ? seconds : smaller(seconds, 3 * usual); }

/* The first times of a number of rows count by the least of them. */
static void average(struct et_llama_costs *costs, int32_t rows, double seconds) {
    double *usual = &costs->usual[rows];
    if (costs->count[rows] < TRIALS) {
        *usual = *usual == 0 ? seconds : smaller(*usual, seconds);
        costs->count[rows]++;
    } else {
        *usual += (bounded(*usual, seconds) - *usual) / REMEMBERED;
    }
}

void et_llama_note(struct et_llama_costs *costs, int32_t used, int32_t rows, double decoded, double all,
                   int32_t tokens) {
    if (!costs->adapts || rows > ET_LLAMA_TIMED)
        return;
    bool had_draft = costs->had_draft;
    costs->had_draft = rows != used;
    if (++costs->batches % FORGET == 0) {
        memset(costs->count, 0, sizeof costs->count);
        costs->change = 0;
    }
    if (rows != used || !had_draft)
        average(costs, rows, decoded);
    double usual = costs->usual[used], counted = bounded(costs->usual[rows], decoded) + all - decoded;
    costs->spent += counted;
    if (usual == 0)
        return;
    if (rows != used) {
        costs->saved += usual * (double)tokens / (double)used - counted;
    } else if (had_draft) {
        double change = smaller(decoded, 2 * usual) - usual;
        bool is_least = costs->change <= 0 || change < costs->change;
        costs->change = is_least ? change : costs->change + (change - costs->change) / REMEMBERED;
        costs->saved -= change;
    }
}
