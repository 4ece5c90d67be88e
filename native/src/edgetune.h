/* The kernels of edgetune_native: plain C that knows nothing of Python and returns codes.
 *
 * Laws (DESIGN, section 5): bytes that reach a file are the same on every instruction set and for any number of threads,
 * and for the GGUF types the same as ggml_quantize_chunk writes. Sizes and pointers are checked by the caller (module.c).
 */
#ifndef EDGETUNE_H
#define EDGETUNE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a kernel can report. module.c turns each into one Python exception. */
enum et_status {
    ET_OK = 0,
    ET_NO_MEMORY,
    ET_NOT_A_NUMBER,   /* a NaN or +inf where a logit is expected */
    ET_NO_MASS,        /* a row of logits that are all -inf: not a distribution */
    ET_BAD_TARGET,     /* a target id outside 0..V-1 */
    ET_GGML_REFUSED,   /* libggml stopped on an assertion while quantizing */
    ET_GGML_SIZE,      /* libggml wrote another number of bytes than its own row size promises */
};

/* How a call over rows ended; row is the first row that failed, for any number of threads. */
struct et_outcome {
    enum et_status status;
    int64_t row;
};

/* ---- threads.c ---------------------------------------------------------------------------------------------------- */

/* Works on rows begin..end-1. On failure stores the row that failed. Runs on several threads at once. */
typedef enum et_status (*et_rows_fn)(const void *job, int64_t begin, int64_t end, int64_t *bad_row);

/* Calls fn over rows 0..n_rows-1 in pieces of `grain` rows, on up to `threads` threads (0: one per core). */
struct et_outcome et_parallel_rows(int64_t n_rows, int64_t grain, int threads, et_rows_fn fn, const void *job);

/* Rows per piece so that a piece has about `elements` elements; at least 1. */
int64_t et_grain(int64_t row_length, int64_t elements);

/* ---- cpu.c -------------------------------------------------------------------------------------------------------- */

enum et_isa { ET_SCALAR = 0, ET_AVX2, ET_AVX512, ET_NEON, ET_ISA_COUNT };

struct et_cpu {
    enum et_isa isa;
    char reason[160];   /* why this isa, in words */
    char features[256]; /* space separated, as /proc/cpuinfo spells them */
};

/* The isa in use. et_cpu_choose must have succeeded before any kernel is called. */
extern enum et_isa et_isa_in_use;

const char *et_isa_name(enum et_isa isa);
bool et_isa_runs_here(enum et_isa isa);

/* Chooses the isa; `wanted` (EDGETUNE_ISA, may be NULL or empty) overrides. False: cpu->reason says what is wrong. */
bool et_cpu_choose(const char *wanted, struct et_cpu *cpu);

/* ---- amx.c -------------------------------------------------------------------------------------------------------- */

struct et_amx {
    bool advertised; /* by the CPU and enabled by the operating system */
    bool usable;     /* a tile product ran in a child process */
    char reason[200];
};

/* Tries AMX in a child process, so that a fault kills the child only. `force` tries even if it is not advertised. */
void et_amx_probe(bool force, struct et_amx *amx);

/* ---- ggml_bridge.c ------------------------------------------------------------------------------------------------ */

struct et_ggml_type {
    int id;               /* enum ggml_type, as it stands in a GGUF file */
    const char *name;     /* libggml's own spelling (q4_K) */
    int64_t block_size;   /* weights per block */
    size_t block_bytes;   /* bytes per block */
    bool requires_weights;
};

/* Opens libggml-base. False: message says why. Idempotent for the first library that could be opened. */
bool et_ggml_open(const char *path, char *message, size_t message_size);
const char *et_ggml_version(void);

/* The types that can be quantized to: i = 0 .. until false. Only after et_ggml_open. */
bool et_ggml_type_at(size_t i, struct et_ggml_type *type);
bool et_ggml_type_by_id(int id, struct et_ggml_type *type);

/* Quantizes f32 rows[n, k] into out[n, row_bytes]; weights[k] or NULL. */
enum et_status et_ggml_quantize(int id, const float *rows, void *out, int64_t n, int64_t k, size_t row_bytes, const float *weights);

/* Allocates the tables that some types need, so that the threads do not race to do it. */
void et_ggml_prepare(int id);

/* One row: blocks[row_bytes] -> out[k]. */
void et_ggml_dequantize_row(int id, const void *blocks, float *out, int64_t k);

/* ---- quantize.c, dequantize.c ------------------------------------------------------------------------------------- */

enum et_dtype { ET_F32 = 0, ET_F16 = 1, ET_BF16 = 2 };

struct et_quantize_job {
    int type;             /* enum ggml_type */
    enum et_dtype dtype;
    const void *rows;     /* [n, k] of dtype, contiguous */
    const float *weights; /* [k] or NULL */
    uint8_t *out;         /* [n, row_bytes] */
    int64_t n, k;
    size_t row_bytes;
};

struct et_dequantize_job {
    int type;              /* enum ggml_type */
    const uint8_t *blocks; /* [n, row_bytes] */
    float *out;            /* [n, k] */
    int64_t n, k;
    size_t row_bytes;
};

size_t et_dtype_bytes(enum et_dtype dtype);
struct et_outcome et_quantize(const struct et_quantize_job *job, int threads);
struct et_outcome et_dequantize(const struct et_dequantize_job *job, int threads);

/* ---- compare.c, compare_<isa>.c ----------------------------------------------------------------------------------- */

struct et_compare_job {
    const float *reference; /* [n, v] logits or log-probabilities */
    const float *other;     /* [n, v] */
    const int64_t *targets; /* [n], each 0..v-1 */
    double *kld;            /* [n] nats, KL(reference || other) */
    uint8_t *same_top;      /* [n] 1 where both have the same arg-max (the lowest index of equals) */
    double *nll_reference;  /* [n] nats */
    double *nll;            /* [n] nats */
    int64_t n, v;
};

struct et_outcome et_compare(const struct et_compare_job *job, int threads);

/* ---- codes.c ------------------------------------------------------------------------------------------------------ */

struct et_encode_job {
    const float *logits; /* [n, v] */
    float *scale;        /* [n] */
    float *min_log_prob; /* [n] */
    uint16_t *codes;     /* [n, v] */
    int64_t n, v;
};

struct et_decode_job {
    const float *scale;        /* [n] */
    const float *min_log_prob; /* [n] */
    const uint16_t *codes;     /* [n, v] */
    float *out;                /* [n, v] log-probabilities */
    int64_t n, v;
};

struct et_outcome et_encode(const struct et_encode_job *job, int threads);
struct et_outcome et_decode(const struct et_decode_job *job, int threads);

#endif
