/* Prints digests of the kernels' results for inputs that are the same on every machine. All instruction sets of this
 * machine must agree. `make test-neon` runs it on this machine and, built for AArch64, under qemu-user: the outputs
 * must be equal. With the path of libggml-base it also compares each block with that of libggml.
 *
 *   test_bits [path/to/libggml-base.so]
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "edgetune.h"
#include "half.h"

enum { ROWS = 37, BLOCKS = 3, MAX_K = BLOCKS * ET_MAX_BLOCK };

static int failures = 0;
static bool have_ggml = false;

/* --- inputs
 * -------------------------------------------------------------------------------------------------------- */

static uint64_t state;

static uint32_t random_bits(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)((state * 0x2545F4914F6CDD1DULL) >> 32);
}

/* In [-1, 1), a multiple of 2^-23: computed from integers, so the same everywhere. */
static float uniform(void) { return (float)((int32_t)(random_bits() >> 8) - (1 << 23)) * 0x1p-23f; }

static float bell(void) {
    float sum = 0;
    for (int i = 0; i < 4; i++) /* in one expression, the order of the calls would be up to the compiler */
        sum += uniform();
    return sum;
}

static float ties(void) { return (float)((int32_t)(random_bits() % 31) - 15) * 0.5f; }

static float sparse(void) { return random_bits() % 16 ? 0 : bell(); }

static float outliers(void) {
    float value = bell();
    return random_bits() % 64 ? value : 500 * value;
}

static float many_sizes(void) {
    float value = bell();
    return ldexpf(value, (int)(random_bits() % 60) - 30);
}

static float positive(void) { return 1 + fabsf(uniform()); }

static float last_bits(void) { return float_of_bits(0xbf800000 + random_bits() % 3); }

static float any_bits(void) { return float_of_bits(random_bits()); }

static const struct {
    const char *name;
    float (*next)(void);
    bool hostile; /* has blocks that only libggml may quantize */
} PATTERNS[] = {
    {"bell", bell, false},
    {"ties", ties, false},
    {"sparse", sparse, false},
    {"outliers", outliers, false},
    {"many sizes", many_sizes, false},
    {"positive", positive, false},
    {"last bits", last_bits, false},
    {"any bits", any_bits, true},
};
enum { PATTERN_COUNT = sizeof PATTERNS / sizeof PATTERNS[0] };

static void fill(float *out, int64_t count, int pattern) {
    state = 77 + (uint64_t)pattern;
    for (int64_t i = 0; i < count; i++)
        out[i] = PATTERNS[pattern].next();
}

/* --- digests
 * -------------------------------------------------------------------------------------------------------- */

static uint64_t digest_of(const void *bytes, size_t count, uint64_t digest) { /* FNV-1a */
    const uint8_t *p = bytes;
    for (size_t i = 0; i < count; i++)
        digest = (digest ^ p[i]) * 0x100000001B3ULL;
    return digest;
}

static const uint64_t NOTHING = 0xCBF29CE484222325ULL;

static bool agrees(uint64_t digest, uint64_t *first, bool is_first, const char *what) {
    if (is_first)
        *first = digest;
    else if (*first != digest) {
        failures++;
        printf("%s differs on %s\n", what, et_isa_name(et_isa_in_use));
    }
    return *first == digest;
}

/* --- quantizers
 * ------------------------------------------------------------------------------------------------------- */

/* Quantizes all blocks with one kernel, group by group. Of a block that is left to libggml, only that fact is
 * counted. */
static uint64_t digest_blocks(const struct et_group_kernels *kernels, const float *x, const float *w, bool hostile) {
    static uint8_t out[ROWS * BLOCKS * ET_MAX_BLOCK_BYTES], discarded[ET_MAX_BLOCK_BYTES];
    uint64_t digest = NOTHING;
    int blocks = ROWS * BLOCKS, left_over = 0;
    for (int first = 0; first < blocks; first += kernels->group) {
        struct et_group group = {.dtype = ET_F32};
        for (int b = 0; b < kernels->group; b++) {
            int block = first + b < blocks ? first + b : blocks - 1;
            group.x[b] = x + block * kernels->block_size;
            group.w[b] = w ? w + block % BLOCKS * kernels->block_size : NULL;
            group.sigma2[b] = 0.25f;
            group.out[b] = first + b < blocks ? out + block * kernels->block_bytes : discarded;
        }
        uint64_t left = (w ? kernels->weighted : kernels->plain)(&group);
        for (int b = 0; b < kernels->group && first + b < blocks; b++) {
            uint8_t is_left = left >> b & 1;
            left_over += is_left;
            digest = digest_of(&is_left, 1, digest);
            digest = is_left ? digest : digest_of(group.out[b], (size_t)kernels->block_bytes, digest);
        }
    }
    if (left_over && !hostile) {
        failures++;
        printf("%d ordinary blocks of type %d were left to libggml on %s\n", left_over, kernels->type,
               et_isa_name(et_isa_in_use));
    }
    return digest;
}

static void test_blocks(int type, int pattern, bool weighted) {
    static float x[ROWS * MAX_K], w[MAX_K];
    uint64_t first = 0;
    char what[80];
    snprintf(what, sizeof what, "type %d, %s, %s", type, PATTERNS[pattern].name, weighted ? "weighted" : "plain");
    fill(x, ROWS * MAX_K, pattern);
    state = 5;
    for (int i = 0; i < MAX_K; i++)
        w[i] = fabsf(uniform()) * 0.01f;
    for (int isa = 0, seen = 0; isa < ET_ISA_COUNT; isa++) {
        if (!et_isa_runs_here((enum et_isa)isa))
            continue;
        et_isa_in_use = (enum et_isa)isa;
        const struct et_quantize_kernels *table = et_kernel_table[isa].quantize;
        for (int i = 0; i < table->count; i++)
            if (table->types[i].type == type)
                agrees(digest_blocks(&table->types[i], x, weighted ? w : NULL, PATTERNS[pattern].hostile), &first,
                       seen++ == 0, what);
    }
    printf("%s: %016" PRIx64 "\n", what, first);
}

/* Quantizes whole rows of each element type with et_quantize. */
static void test_rows(const struct et_group_kernels *kernels, enum et_dtype dtype, bool weighted) {
    static float x[ROWS * MAX_K], w[MAX_K];
    static uint16_t halves[ROWS * MAX_K];
    static uint8_t out[ROWS * BLOCKS * ET_MAX_BLOCK_BYTES], theirs[ROWS * BLOCKS * ET_MAX_BLOCK_BYTES];
    int64_t k = BLOCKS * kernels->block_size;
    size_t row_bytes = (size_t)(BLOCKS * kernels->block_bytes), bytes = ROWS * row_bytes;
    uint64_t first = 0;
    char what[80];
    snprintf(what, sizeof what, "type %d, rows of dtype %d, %s", kernels->type, (int)dtype,
             weighted ? "weighted" : "plain");
    fill(x, ROWS * k, 0);
    for (int64_t i = 0; i < k; i++)
        w[i] = fabsf(uniform());
    for (int64_t i = 0; i < ROWS * k; i++) {
        halves[i] = dtype == ET_F16 ? f16_of_float(x[i]) : (uint16_t)(bits_of_float(x[i]) >> 16);
        if (dtype != ET_F32)
            x[i] = dtype == ET_F16 ? float_of_f16(halves[i]) : float_of_bf16(halves[i]);
    }
    struct et_quantize_job job = {.type = kernels->type,
                                  .dtype = dtype,
                                  .rows = dtype == ET_F32 ? (void *)x : halves,
                                  .weights = weighted ? w : NULL,
                                  .out = out,
                                  .n = ROWS,
                                  .k = k,
                                  .row_bytes = row_bytes};
    for (int isa = 0, seen = 0; isa < ET_ISA_COUNT; isa++) {
        if (!et_isa_runs_here((enum et_isa)isa))
            continue;
        et_isa_in_use = (enum et_isa)isa;
        for (int threads = 1; threads < 4; threads++) {
            memset(out, 0xa5, bytes);
            failures += et_quantize(&job, threads).status != ET_OK;
            agrees(digest_of(out, bytes, NOTHING), &first, seen++ == 0, what);
        }
    }
    if (have_ggml) {
        failures += et_ggml_quantize(kernels->type, x, theirs, ROWS, k, row_bytes, weighted ? w : NULL) != ET_OK;
        agrees(digest_of(theirs, bytes, NOTHING), &first, false, "libggml's own");
    }
    printf("%s: %016" PRIx64 "\n", what, first);
}

/* --- the other kernels: a function that returns a digest, called for each instruction set and thread count
 * ------------- */

typedef uint64_t (*digest_fn)(int variant, int threads);

static void test_digests(const char *name, int variants, digest_fn digest) {
    for (int variant = 0; variant < variants; variant++) {
        uint64_t first = 0;
        char what[80];
        snprintf(what, sizeof what, "%s %d", name, variant);
        for (int isa = 0, seen = 0; isa < ET_ISA_COUNT; isa++) {
            if (!et_isa_runs_here((enum et_isa)isa))
                continue;
            et_isa_in_use = (enum et_isa)isa;
            for (int threads = 1; threads < 4; threads++)
                agrees(digest(variant, threads), &first, seen++ == 0, what);
        }
        printf("%s: %016" PRIx64 "\n", what, first);
    }
}

/* ROWS x k elements of the type, of the same values. */
static const void *rows_of(enum et_dtype dtype, int64_t k) {
    static float x[ROWS * MAX_K];
    static uint16_t halves[ROWS * MAX_K];
    fill(x, ROWS * k, 0);
    for (int64_t i = 0; i < ROWS * k; i++)
        halves[i] = dtype == ET_F16 ? f16_of_float(x[i]) : (uint16_t)(bits_of_float(x[i]) >> 16);
    return dtype == ET_F32 ? (const void *)x : halves;
}

/* variant: element type, 4 or 8 bits, symmetric, f16 scales, importance, block size */
static uint64_t digest_nbits(int variant, int threads) {
    static float w[MAX_K];
    static uint8_t codes[ROWS * MAX_K * 2], zeros[ROWS * MAX_K];
    static float scales[ROWS * MAX_K];
    const int64_t k = 333, size = 16 << variant % 5;
    struct et_nbits_format format = {variant & 1 ? 4 : 8, (int)size, (variant & 2) != 0, (variant & 4) != 0};
    enum et_dtype dtype = (enum et_dtype)(variant % 3);
    size_t k_blocks = (size_t)((k - 1) / size + 1);
    size_t scale_bytes = ROWS * k_blocks * (format.half_scales ? 2 : 4);
    struct et_nbits_quantize_job job = {.format = format,
                                        .dtype = dtype,
                                        .rows = rows_of(dtype, k),
                                        .codes = codes,
                                        .scales = scales,
                                        .zero_points = format.symmetric ? NULL : zeros,
                                        .n = ROWS,
                                        .k = k,
                                        .search = true,
                                        .weights = variant & 8 ? w : NULL};
    state = 9;
    for (int64_t i = 0; i < k; i++)
        w[i] = fabsf(uniform());
    failures += et_nbits_quantize(&job, threads).status != ET_OK;
    uint64_t digest = digest_of(codes, ROWS * k_blocks * (size_t)(size * format.bits / 8), NOTHING);
    digest = digest_of(scales, scale_bytes, digest);
    return format.symmetric ? digest : digest_of(zeros, ROWS * ((k_blocks * (size_t)format.bits + 7) / 8), digest);
}

/* variant: element type, blocksize; absmax, nesting, codes, and back */
static uint64_t digest_4bit(int variant, int threads) {
    static const float values[16] = {-1,      -0.75f, -0.5f, -0.375f, -0.25f,  -0.1875f, -0.125f, 0,
                                     0.0625f, 0.125f, 0.25f, 0.3125f, 0.4375f, 0.5625f,  0.75f,   1};
    static float absmax[ROWS * MAX_K], scales[ROWS * MAX_K], nested[ROWS * MAX_K], out[ROWS * MAX_K], map[256];
    static uint8_t codes[ROWS * MAX_K], packed[ROWS * MAX_K], nearest[ET_NEAREST_SIZE];
    const int64_t k = 333, count = ROWS * k, size = 32 << variant / 3, blocks = et_blocks(count, size);
    enum et_dtype dtype = (enum et_dtype)(variant % 3);
    const void *rows = rows_of(dtype, k);
    struct et_four_bit type;
    et_four_bit_of(values, &type);
    for (int i = 0; i < ET_NEAREST_SIZE; i++)
        nearest[i] = (uint8_t)(i >> 8);
    for (int i = 0; i < 256; i++)
        map[i] = (float)(i - 128) / 128;
    struct et_absmax_job absmax_job = {dtype, rows, absmax, count, size, k};
    failures += et_absmax(&absmax_job, threads).status != ET_OK;
    float offset = et_torch_mean(absmax, blocks, 2);
    struct et_nest_job nest = {absmax, nearest, codes, nested, blocks, 256, offset};
    struct et_unnest_job unnest = {codes, map, nested, scales, blocks, 256, offset};
    struct et_quantize_4bit_job quantize = {&type, dtype, rows, absmax, packed, count, size};
    struct et_dequantize_4bit_job dequantize = {&type, packed, scales, dtype, out, count, size};
    failures += et_nest(&nest, threads).status != ET_OK || et_unnest(&unnest, threads).status != ET_OK;
    failures += et_quantize_4bit(&quantize, threads).status != ET_OK;
    failures += et_dequantize_4bit(&dequantize, threads).status != ET_OK;
    uint64_t digest = digest_of(packed, (size_t)(count + 1) / 2, NOTHING);
    return digest_of(out, (size_t)count * sizeof *out, digest_of(scales, (size_t)blocks * sizeof *scales, digest));
}

/* variant: element type, rank */
static uint64_t digest_product(int variant, int threads) {
    static float left[ROWS * 17], right[17 * MAX_K], out[ROWS * MAX_K];
    const int64_t k = 333, r = variant < 3 ? 16 : 17;
    enum et_dtype dtype = (enum et_dtype)(variant % 3);
    fill(left, ROWS * r, 0);
    fill(right, r * k, 5);
    struct et_product_job job = {dtype, rows_of(dtype, k), left, right, out, ROWS, r, k};
    failures += et_add_product(&job, threads).status != ET_OK;
    return digest_of(out, (size_t)(ROWS * k) * sizeof *out, NOTHING);
}

static uint64_t digest_int8(int variant, int threads) {
    static int8_t codes[ROWS * MAX_K];
    static float scb[ROWS], out[ROWS * MAX_K];
    state = 3;
    for (int i = 0; i < ROWS * MAX_K; i++)
        codes[i] = (int8_t)random_bits();
    for (int i = 0; i < ROWS; i++)
        scb[i] = fabsf(uniform());
    struct et_dequantize_int8_job job = {codes, scb, (enum et_dtype)variant, out, ROWS, MAX_K};
    failures += et_dequantize_int8(&job, threads).status != ET_OK;
    return digest_of(out, sizeof out, NOTHING);
}

/* variant: both element types, -inf in the rows or not, and whether the rows are near each other */
static uint64_t digest_logits(int variant, int threads) {
    enum { V = 1999 };
    static float a[ROWS * V], b[ROWS * V], scale[ROWS], low[ROWS], back[ROWS * V];
    static uint16_t half_a[ROWS * V], half_b[ROWS * V], codes[ROWS * V];
    static int64_t targets[ROWS];
    static double out[7][ROWS];
    static uint8_t same[ROWS];
    enum et_dtype dtype_a = (enum et_dtype)(variant % 3), dtype_b = (enum et_dtype)(variant / 3 % 3);
    const bool denied = (variant & 1) != 0;
    const float distance = variant < 9 ? 0.01f : 3.0f;
    state = 21;
    for (int i = 0; i < ROWS * V; i++) {
        a[i] = 4 * bell();
        b[i] = a[i] + distance * uniform();
        if (denied && i % 13 == 5)
            a[i] = b[i] = -INFINITY;
        half_a[i] = dtype_a == ET_F16 ? f16_of_float(a[i]) : (uint16_t)(bits_of_float(a[i]) >> 16);
        half_b[i] = dtype_b == ET_F16 ? f16_of_float(b[i]) : (uint16_t)(bits_of_float(b[i]) >> 16);
    }
    for (int i = 0; i < ROWS; i++)
        targets[i] = i * 53 % V;
    struct et_compare_job compare = {.reference = dtype_a == ET_F32 ? (void *)a : half_a,
                                     .other = dtype_b == ET_F32 ? (void *)b : half_b,
                                     .reference_dtype = dtype_a,
                                     .other_dtype = dtype_b,
                                     .targets = targets,
                                     .kld = out[0],
                                     .same_top = same,
                                     .nll_reference = out[1],
                                     .nll = out[2],
                                     .reverse_kld = out[3],
                                     .entropy_reference = out[4],
                                     .entropy = out[5],
                                     .top_k_overlap = out[6],
                                     .n = ROWS,
                                     .v = V,
                                     .top_k = 10};
    struct et_encode_job encode = {compare.reference, dtype_a, scale, low, codes, ROWS, V};
    struct et_decode_job decode = {scale, low, codes, back, ROWS, V};
    failures += et_compare(&compare, threads).status != ET_OK || et_encode(&encode, threads).status != ET_OK;
    failures += et_decode(&decode, threads).status != ET_OK;
    uint64_t digest = digest_of(same, sizeof same, digest_of(out, sizeof out, NOTHING));
    return digest_of(back, sizeof back, digest_of(codes, sizeof codes, digest));
}

int main(int argc, char **argv) {
    char message[256];
    if (argc > 1) {
        have_ggml = et_ggml_open(argv[1], message, sizeof message);
        if (!have_ggml) {
            fprintf(stderr, "%s\n", message);
            return 2;
        }
    }
    for (int i = 0; i < et_kernel_table[ET_SCALAR].quantize->count; i++)
        for (int weighted = 0; weighted < 2; weighted++) {
            for (int pattern = 0; pattern < PATTERN_COUNT; pattern++)
                test_blocks(et_kernel_table[ET_SCALAR].quantize->types[i].type, pattern, weighted);
            for (int dtype = ET_F32; dtype <= ET_BF16; dtype++)
                test_rows(&et_kernel_table[ET_SCALAR].quantize->types[i], (enum et_dtype)dtype, weighted);
        }
    test_digests("blocks for ONNX", 30, digest_nbits);
    test_digests("4 bits", 9, digest_4bit);
    test_digests("adapters", 6, digest_product);
    test_digests("int8", 3, digest_int8);
    test_digests("logits", 18, digest_logits);
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
