/* A parallel loop over rows. Threads live for one call: to start one takes about 20 microseconds, a piece takes
 * longer. */
#include "edgetune.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

enum { MAX_THREADS = 256 };

struct loop {
    int64_t n_rows, grain;
    et_rows_fn fn;
    const void *job;
    _Atomic int64_t next; /* first row that no thread has taken */
    atomic_bool failed;   /* stop taking more rows */
    pthread_mutex_t lock; /* guards outcome */
    struct et_outcome outcome;
};

/* Threads take pieces in ascending order and finish each, so the lowest row that fails is always found. */
static void record_failure(struct loop *loop, enum et_status status, int64_t row) {
    pthread_mutex_lock(&loop->lock);
    if (loop->outcome.status == ET_OK || row < loop->outcome.row)
        loop->outcome = (struct et_outcome){status, row};
    pthread_mutex_unlock(&loop->lock);
    atomic_store(&loop->failed, true);
}

static void *take_pieces(void *argument) {
    struct loop *loop = argument;
    while (!atomic_load(&loop->failed)) {
        int64_t begin = atomic_fetch_add(&loop->next, loop->grain);
        if (begin >= loop->n_rows)
            break;
        int64_t left = loop->n_rows - begin;
        int64_t end = begin + (left < loop->grain ? left : loop->grain);
        int64_t bad_row = begin;
        enum et_status status = loop->fn(loop->job, begin, end, &bad_row);
        if (status != ET_OK)
            record_failure(loop, status, bad_row);
    }
    return NULL;
}

/* Cores that this process may use; containers and taskset may allow fewer than the machine has. */
static int64_t usable_cores(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores > 0 ? cores : 1;
}

static int64_t thread_count(int wanted, int64_t pieces) {
    int64_t threads = wanted > 0 ? wanted : usable_cores();
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    return threads < pieces ? threads : pieces;
}

struct et_outcome et_parallel_rows(int64_t n_rows, int64_t grain, int threads, et_rows_fn fn, const void *job) {
    struct loop loop = {.n_rows = n_rows, .grain = grain, .fn = fn, .job = job, .outcome = {ET_OK, -1}};
    pthread_mutex_init(&loop.lock, NULL);

    /* The main thread of Python must receive all signals, so the workers block them. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t workers[MAX_THREADS];
    int64_t helpers = thread_count(threads, (n_rows - 1) / grain + 1) - 1;
    int64_t started = 0;
    /* If the system starts fewer threads, those do all the work. */
    while (started < helpers && pthread_create(&workers[started], NULL, take_pieces, &loop) == 0)
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);

    take_pieces(&loop);
    while (started > 0)
        pthread_join(workers[--started], NULL);
    pthread_mutex_destroy(&loop.lock);
    return loop.outcome;
}

int64_t et_grain(int64_t row_length, int64_t elements) {
    int64_t rows = row_length > 0 ? elements / row_length : elements;
    return rows > 0 ? rows : 1;
}
