/* The kernels of edgetune_native: plain C without Python. A kernel returns a status.
 *
 * Laws (docs/native.md): bytes that reach a file are the same on every instruction set and for any number of threads.
 * For the GGUF types they are also those that ggml_quantize_chunk writes. The caller (py_*.c) checks sizes and
 * pointers.
 */
#ifndef EDGETUNE_H
#define EDGETUNE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The status of a call. module.c turns each into one Python exception. */
enum et_status {
    ET_OK = 0,
    ET_NO_MEMORY,
    ET_NOT_A_NUMBER,    /* a NaN or +inf where a logit is expected */
    ET_NO_MASS,         /* all logits of a row are -inf: it is not a distribution */
    ET_BAD_TARGET,      /* a target id outside 0..V-1 */
    ET_GGML_REFUSED,    /* an assertion of libggml failed while it quantized */
    ET_GGML_SIZE,       /* libggml wrote a number of bytes that differs from its row size */
    ET_NOT_FINITE,      /* a NaN or an infinity where a weight is expected */
    ET_SCALE_TOO_LARGE, /* a block needs a scale that float16 cannot hold */
};

/* The result of a call over rows. `row` is the first row that failed, for any number of threads. */
struct et_outcome {
    enum et_status status;
    int64_t row;
};

/* ---- threads.c
 * ---------------------------------------------------------------------------------------------------- */

/* Processes rows begin .. end-1. On failure it stores the row that failed. It runs on several threads at once. */
typedef enum et_status (*et_rows_fn)(const void *job, int64_t begin, int64_t end, int64_t *bad_row);

/* Calls fn for rows 0 .. n_rows-1 in pieces of `grain` rows, on up to `threads` threads (0: one per core). */
struct et_outcome et_parallel_rows(int64_t n_rows, int64_t grain, int threads, et_rows_fn fn, const void *job);

/* Rows in a piece of about `elements` elements; at least 1. */
int64_t et_grain(int64_t row_length, int64_t elements);

/* ---- cpu.c
 * -------------------------------------------------------------------------------------------------------- */

enum et_isa { ET_SCALAR = 0, ET_AVX2, ET_AVX512, ET_NEON, ET_ISA_COUNT };

struct et_cpu {
    enum et_isa isa;
    char reason[160];   /* why it was chosen */
    char features[256]; /* space separated, as /proc/cpuinfo spells them */
};

/* The instruction set in use. et_cpu_choose must succeed before a kernel is called. */
extern enum et_isa et_isa_in_use;

const char *et_isa_name(enum et_isa isa);
bool et_isa_runs_here(enum et_isa isa);

/* Chooses the instruction set; `wanted` (EDGETUNE_ISA; may be NULL or empty) overrides. False: cpu->reason is the
 * error. */
bool et_cpu_choose(const char *wanted, struct et_cpu *cpu);

/* ---- amx.c
 * -------------------------------------------------------------------------------------------------------- */

struct et_amx {
    bool advertised; /* by the CPU and enabled by the operating system */
    bool usable;     /* a tile product ran in a child process */
    char reason[200];
};

/* Tries AMX in a child process, so that a fault ends only the child. `force`: also where AMX is not advertised. */
void et_amx_probe(bool force, struct et_amx *amx);

/* ---- ggml_bridge.c
 * ------------------------------------------------------------------------------------------------ */

struct et_ggml_type {
    int id;             /* enum ggml_type, as it stands in a GGUF file */
    const char *name;   /* libggml's own spelling (q4_K) */
    int64_t block_size; /* weights per block */
    size_t block_bytes; /* bytes per block */
    bool requires_weights;
};

/* Opens libggml-base. False: `message` is the error. Once a library is open, further calls do nothing. */
bool et_ggml_open(const char *path, char *message, size_t message_size);
const char *et_ggml_version(void);

/* The types that can be quantized to: i = 0 .. until false. Only after et_ggml_open. */
bool et_ggml_type_at(size_t i, struct et_ggml_type *type);
bool et_ggml_type_by_id(int id, struct et_ggml_type *type);

/* Quantizes f32 rows[n, k] into out[n, row_bytes]; weights[k] or NULL. */
enum et_status et_ggml_quantize(int id, const float *rows, void *out, int64_t n, int64_t k, size_t row_bytes,
                                const float *weights);

/* Allocates the tables that some types need, before threads would do so at the same time. */
void et_ggml_prepare(int id);

/* One row: blocks[row_bytes] -> out[k]. */
void et_ggml_dequantize_row(int id, const void *blocks, float *out, int64_t k);

/* ---- quantize.c, dequantize.c
 * ------------------------------------------------------------------------------------- */

enum et_dtype { ET_F32 = 0, ET_F16 = 1, ET_BF16 = 2 };

struct et_quantize_job {
    int type; /* enum ggml_type */
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

/* ---- product.c ----------------------------------------------------------------------------------- */

struct et_product_job {
    enum et_dtype dtype;
    const void *rows;   /* [n, k] of dtype, contiguous */
    const float *left;  /* [n, r] */
    const float *right; /* [r, k] */
    float *out;         /* [n, k] */
    int64_t n, r, k;
};

/* out = rows + left right. ET_NOT_FINITE: the first row with a sum that is not finite. */
struct et_outcome et_add_product(const struct et_product_job *job, int threads);

/* ---- nbits.c -------------------------------------------------------------------------------------- */

/* Blocks along k as com.microsoft.MatMulNBits reads them. If the last block of a row is short, its codes are padded
 * with the zero point. k_blocks = ceil(k / block_size). */
struct et_nbits_format {
    int bits;         /* 4 or 8 */
    int block_size;   /* 16, 32, 64, 128 or 256 */
    bool symmetric;   /* the zero point is 8 or 128, and not stored */
    bool half_scales; /* scales are float16 bits, not f32 */
};

struct et_nbits_quantize_job {
    struct et_nbits_format format;
    bool search; /* for the scale of the least error; otherwise the range of the block determines the scale */
    enum et_dtype dtype;
    const void *rows;     /* [n, k] of dtype, contiguous */
    const float *weights; /* [k], finite and not negative, or NULL */
    uint8_t *codes;       /* [n, k_blocks, block_size * bits / 8], of two 4-bit codes the first in the low half */
    void *scales;         /* [n, k_blocks] */
    uint8_t *zero_points; /* [n, ceil(k_blocks * bits / 8)], packed as the codes; NULL if symmetric */
    int64_t n, k;
};

struct et_nbits_dequantize_job {
    struct et_nbits_format format;
    const uint8_t *codes;
    const void *scales;
    const uint8_t *zero_points;
    float *out; /* [n, k] */
    int64_t n, k;
};

struct et_outcome et_nbits_quantize(const struct et_nbits_quantize_job *job, int threads);
struct et_outcome et_nbits_dequantize(const struct et_nbits_dequantize_job *job, int threads);

/* ---- compare.c ----------------------------------------------------------------------------------- */

struct et_compare_job {
    const void *reference; /* [n, v] logits or log-probabilities */
    const void *other;     /* [n, v] */
    enum et_dtype reference_dtype, other_dtype;
    const int64_t *targets;    /* [n], each 0..v-1 */
    double *kld;               /* [n] nats, KL(reference || other) */
    uint8_t *same_top;         /* [n] 1 where both have the same arg-max (the lowest index of equals) */
    double *nll_reference;     /* [n] nats */
    double *nll;               /* [n] nats */
    double *reverse_kld;       /* [n] nats, KL(other || reference) */
    double *entropy_reference; /* [n] nats */
    double *entropy;           /* [n] nats */
    double *top_k_overlap; /* [n] share of the reference's k largest that are also among the k largest of the other */
    int64_t n, v, top_k;   /* 1 <= top_k <= v */
};

struct et_outcome et_compare(const struct et_compare_job *job, int threads);

/* ---- codes.c
 * ------------------------------------------------------------------------------------------------------ */

struct et_encode_job {
    const void *logits; /* [n, v] */
    enum et_dtype dtype;
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

/* ---- bnb_absmax.c, bnb_4bit.c, bnb_int8.c: the formats of bitsandbytes, with its CPU arithmetic
 * ------------------- */

enum { ET_LARGEST_BLOCK = 4096, ET_NEAREST_SIZE = 65536 };

/* A 4-bit data type: the values of its codes. The rank of a value is the number of bounds below it. */
struct et_four_bit {
    float values[16]; /* by code */
    float bounds
        [20]; /* 15 ascending, halfway between the values of neighboring ranks; then padding that vector loads read */
    uint8_t codes[16]; /* by rank */
    bool ascending;    /* codes[rank] == rank */
};

/* Weights in blocks of `blocksize` (even, at most ET_LARGEST_BLOCK), which continue across the ends of rows. */
struct et_absmax_job {
    enum et_dtype dtype;
    const void *rows; /* [count] of dtype */
    float *absmax;    /* [blocks] the largest |weight|; at least 1e-38 in a last block that is not whole */
    int64_t count, blocksize;
    int64_t k; /* weights per row, to report the row that fails */
};

/* Encodes numbers around `offset` as 8-bit codes of a 256-entry map, in blocks with their own absmax. */
struct et_nest_job {
    const float *absmax;    /* [count] */
    const uint8_t *nearest; /* [ET_NEAREST_SIZE] the code for each step from -1 to 1 */
    uint8_t *codes;         /* [count] */
    float *nested_absmax;   /* [blocks] */
    int64_t count, blocksize;
    float offset;
};

struct et_unnest_job {
    const uint8_t *codes;       /* [count] */
    const float *map;           /* [256] */
    const float *nested_absmax; /* [blocks] */
    float *absmax;              /* [count] */
    int64_t count, blocksize;
    float offset;
};

struct et_quantize_4bit_job {
    const struct et_four_bit *type;
    enum et_dtype dtype;
    const void *rows;    /* [count] of dtype */
    const float *absmax; /* [blocks] from et_absmax */
    uint8_t *packed;     /* [(count + 1) / 2] */
    int64_t count, blocksize;
};

struct et_dequantize_4bit_job {
    const struct et_four_bit *type;
    const uint8_t *packed; /* [(count + 1) / 2] */
    const float *absmax;   /* [blocks] */
    enum et_dtype dtype;   /* to which the products are rounded */
    float *out;            /* [count] */
    int64_t count, blocksize;
};

/* Quantizes and dequantizes in one pass. `from` and `to` may have different absmax; their `packed` is not used. */
struct et_roundtrip_4bit_job {
    struct et_quantize_4bit_job from;
    struct et_dequantize_4bit_job to;
};

struct et_dequantize_int8_job {
    const int8_t *codes; /* [n, k] */
    const float *scb;    /* [n] the largest |weight| of each row */
    enum et_dtype dtype; /* to which the weights are rounded */
    float *out;          /* [n, k] */
    int64_t n, k;
};

void et_four_bit_of(const float *values /* [16] */, struct et_four_bit *type);

static inline int64_t et_blocks(int64_t count, int64_t blocksize) {
    return count / blocksize + (count % blocksize != 0);
}

/* The mean, added in the order of PyTorch's CPU kernel on that many threads, which determines the last bits. */
float et_torch_mean(const float *values /* [count] */, int64_t count, int threads);

struct et_outcome et_absmax(const struct et_absmax_job *job, int threads);
struct et_outcome et_nest(const struct et_nest_job *job, int threads);
struct et_outcome et_unnest(const struct et_unnest_job *job, int threads);
struct et_outcome et_quantize_4bit(const struct et_quantize_4bit_job *job, int threads);
struct et_outcome et_dequantize_4bit(const struct et_dequantize_4bit_job *job, int threads);
struct et_outcome et_roundtrip_4bit(const struct et_roundtrip_4bit_job *job, int threads);
struct et_outcome et_dequantize_int8(const struct et_dequantize_int8_job *job, int threads);

/* ---- llama_bridge.c, llama_slots.c, llama_costs.c
 * ------------------------------------------------------------------------------------------------ */

/* Opens libllama. False: `message` is the error. Once a library is open, further calls do nothing. */
bool et_llama_open(const char *path, char *message, size_t message_size);

/* Sequences of a context of llama.cpp that are continued together; one thread calls all functions but
 * et_llama_interrupt. */
struct et_llama_slots;

struct et_llama_config {
    void *context;       /* llama_context of n_slots sequences, which the caller frees after the slots */
    const void *vocab;   /* llama_vocab */
    volatile char *stop; /* the byte that the abort callback of the context reads */
    int32_t n_slots;
    int32_t room;    /* tokens of a prompt and its answer */
    int32_t offset;  /* tokens in the cache of each sequence before its text */
    int32_t n_batch; /* tokens of a batch */
    int32_t piece;   /* tokens of prompts in a batch with running answers */
    int64_t v;       /* logits of a row */
    bool is_exact;   /* each batch has one sequence, whose result then does not depend on the others */
};

/* How a slot continues its sequence. */
struct et_llama_task {
    const int32_t *ids; /* [n] the prompt */
    int32_t n;
    int32_t kept;   /* tokens of the prompt that the cache of the slot has: at most et_llama_match, below n */
    void *chain;    /* llama_sampler, which the caller frees after et_llama_stop; NULL takes the most likely token */
    int32_t top_k;  /* of the chain's first sampler, if that is top-k; else 0 */
    int32_t likely; /* tokens in et_llama_chosen.likely; -1: no log-probabilities */
    int32_t draft;  /* tokens that are guessed from the sequence and verified together; only for chain NULL */
    int32_t group;  /* only sequences of the same group are evaluated together */
};

struct et_llama_likely {
    int32_t token;
    double logprob;
};

enum { ET_LLAMA_PIECE = 256 };

struct et_llama_chosen {
    int32_t slot, token;
    int32_t piece_size; /* bytes of the token; if it is negative, minus the bytes that there is no room for */
    char piece[ET_LLAMA_PIECE];
    double logprob;
    bool was_guessed;
    bool is_near_tie; /* another token had nearly the same logit in a batch with guesses: it was chosen again without */
    int32_t n_likely;
    struct et_llama_likely *likely; /* valid until the next turn */
};

struct et_llama_turn {
    int32_t status; /* of llama_decode; 0 also where there was nothing to do */
    int32_t count;
    const struct et_llama_chosen *chosen; /* [count] valid until the next turn */
};

struct et_llama_slots *et_llama_new(const struct et_llama_config *config);
void et_llama_free(struct et_llama_slots *slots);

/* How many tokens of a prompt the cache of a slot begins with. */
int32_t et_llama_match(const struct et_llama_slots *slots, int32_t slot, const int32_t *ids, int32_t n);

bool et_llama_is_running(const struct et_llama_slots *slots, int32_t slot);
bool et_llama_has_prompts(const struct et_llama_slots *slots);

/* Begins with a task in a free slot; returns how many tokens of its prompt were kept, or -1 without memory. */
int32_t et_llama_start(struct et_llama_slots *slots, int32_t slot, const struct et_llama_task *task);

/* Copies the sequence of a slot into another one that is free. False without memory. */
bool et_llama_copy(struct et_llama_slots *slots, int32_t from, int32_t to);

/* Permits only tokens with a bit in mask[(v + 31) / 32] for the next token of a slot; NULL permits all again. */
void et_llama_mask(struct et_llama_slots *slots, int32_t slot, const uint32_t *mask);

enum { ET_LLAMA_COSTS = 6 };

/* Sets the table of n-grams that drafts come from; a copy of cells[count], count a power of 2. False without memory. */
bool et_llama_set_table(struct et_llama_slots *slots, const uint64_t *cells, uint32_t count, int32_t longest);

/* Sets the model that drafts where the table has none: a llama_context as that of the slots, of the same vocabulary, which
 * the caller frees after them. */
void et_llama_set_draft_model(struct et_llama_slots *slots, void *context);

/* Sets the time of batches of 1, 2, 4, 8, 16 and 32 rows, relative to the first. adapts: times that are measured while
 * answers are generated go before them, and guessing stops where it has cost time. */
void et_llama_set_costs(struct et_llama_slots *slots, const float *costs, bool adapts);

/* Permits drafts of at most so many tokens to the sequence of a slot without chain until it stops. */
void et_llama_draft(struct et_llama_slots *slots, int32_t slot, int32_t most);

/* How many tokens have been guessed and verified, right or wrong. */
int64_t et_llama_drafted(const struct et_llama_slots *slots);

/* Evaluates one batch: a token of each running answer of a group, and pieces of its prompts. */
struct et_llama_turn et_llama_turn(struct et_llama_slots *slots, int32_t group);

/* Frees a slot. Its cache stays, for a prompt that begins alike. */
void et_llama_stop(struct et_llama_slots *slots, int32_t slot);

/* Ends the batch that is being evaluated, if it has part of a prompt. Any thread may call it. */
void et_llama_interrupt(struct et_llama_slots *slots);

#endif
