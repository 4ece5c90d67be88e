/* The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on exactly sized allocations so that a read or write
 * past an end is seen. Values are tested from Python; here it is memory, arithmetic and threads.
 *
 *   test_kernels path/to/libggml-base.so
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgetune.h"

static int failures = 0;

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                           \
            failures++;                                                                                               \
        }                                                                                                             \
    } while (0)

static uint64_t state = 1;

static uint32_t random_bits(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)((state * 0x2545F4914F6CDD1DULL) >> 32);
}

static float *random_floats(int64_t count, bool any_bits) {
    float *out = malloc((size_t)count * sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = random_bits();
        if (any_bits)
            memcpy(&out[i], &bits, sizeof bits);
        else
            out[i] = (float)(int32_t)bits * 0x1p-29f;
    }
    return out;
}

/* libggml itself is not sanitized, but what it reads and writes in our buffers is bounded by their exact size. */
static void test_quantize(struct et_ggml_type type, enum et_dtype dtype, int64_t n) {
    const int64_t k = 2 * type.block_size > 64 ? 2 * type.block_size : 64;
    size_t row_bytes = (size_t)(k / type.block_size) * type.block_bytes;
    float *floats = random_floats(n * k, false), *weights = random_floats(k, false), *back = malloc((size_t)(n * k) * 4);
    uint16_t *halves = malloc((size_t)(n * k) * sizeof *halves);
    for (int64_t i = 0; i < n * k; i++)
        halves[i] = dtype == ET_F16 ? (uint16_t)(random_bits() & 0xbbff) : (uint16_t)(0x3f00 | (random_bits() & 0x80ff));
    for (int64_t i = 0; i < k; i++)
        weights[i] = fabsf(weights[i]);
    uint8_t *one = malloc((size_t)n * row_bytes), *many = malloc((size_t)n * row_bytes);
    struct et_quantize_job job = {.type = type.id, .dtype = dtype, .rows = dtype == ET_F32 ? (void *)floats : halves,
                                  .weights = weights, .out = one, .n = n, .k = k, .row_bytes = row_bytes};
    CHECK(et_quantize(&job, 1).status == ET_OK);
    job.out = many;
    CHECK(et_quantize(&job, 4).status == ET_OK);
    CHECK(memcmp(one, many, (size_t)n * row_bytes) == 0);
    struct et_dequantize_job undo = {.type = type.id, .blocks = one, .out = back, .n = n, .k = k, .row_bytes = row_bytes};
    CHECK(et_dequantize(&undo, 3).status == ET_OK);
    free(floats), free(weights), free(back), free(halves), free(one), free(many);
}

static void test_compare(int64_t n, int64_t v, bool any_bits) {
    float *a = random_floats(n * v, any_bits), *b = random_floats(n * v, any_bits);
    int64_t *targets = malloc((size_t)n * sizeof *targets);
    double *kld = malloc((size_t)n * 8), *nll_a = malloc((size_t)n * 8), *nll_b = malloc((size_t)n * 8);
    uint8_t *same = malloc((size_t)n);
    for (int64_t i = 0; i < n; i++)
        targets[i] = random_bits() % v;
    struct et_compare_job job = {a, b, targets, kld, same, nll_a, nll_b, n, v};
    struct et_outcome outcome = et_compare(&job, 3);
    CHECK(any_bits || outcome.status == ET_OK);
    for (int64_t i = 0; !any_bits && i < n; i++)
        CHECK(kld[i] >= 0 && isfinite(kld[i]) && isfinite(nll_a[i]) && same[i] <= 1);
    targets[n - 1] = v;
    CHECK(et_compare(&job, 1).status != ET_OK);
    free(a), free(b), free(targets), free(kld), free(nll_a), free(nll_b), free(same);
}

static void test_codes(int64_t n, int64_t v, bool any_bits) {
    float *logits = random_floats(n * v, any_bits), *scale = calloc((size_t)n, 4), *low = calloc((size_t)n, 4);
    float *back = malloc((size_t)(n * v) * 4);
    uint16_t *codes = calloc((size_t)(n * v), 2);
    struct et_encode_job job = {logits, scale, low, codes, n, v};
    CHECK(et_encode(&job, 2).status == ET_OK || any_bits);
    struct et_decode_job undo = {scale, low, codes, back, n, v};
    CHECK(et_decode(&undo, 2).status == ET_OK);
    for (int64_t i = 0; !any_bits && i < n * v; i++)
        CHECK(back[i] <= 1e-3f);
    free(logits), free(scale), free(low), free(codes), free(back);
}

static enum et_status fail_at_seven(const void *job, int64_t begin, int64_t end, int64_t *bad_row) {
    (void)job;
    if (begin > 7 || end <= 7)
        return begin > 7 ? ET_NO_MASS : ET_OK;
    *bad_row = 7;
    return ET_NOT_A_NUMBER;
}

static void test_threads(void) {
    for (int threads = 1; threads < 9; threads++) {
        struct et_outcome outcome = et_parallel_rows(1000, 3, threads, fail_at_seven, NULL);
        CHECK(outcome.status == ET_NOT_A_NUMBER && outcome.row == 7);
        CHECK(et_parallel_rows(0, 3, threads, fail_at_seven, NULL).status == ET_OK);
    }
}

int main(int argc, char **argv) {
    char message[256];
    struct et_ggml_type type;
    struct et_cpu cpu;
    if (argc != 2 || !et_ggml_open(argv[1], message, sizeof message)) {
        fprintf(stderr, "usage: test_kernels path/to/libggml-base.so%s%s\n", argc == 2 ? "\n" : "", argc == 2 ? message : "");
        return 2;
    }
    test_threads();
    for (int isa = 0; isa < ET_ISA_COUNT; isa++) {
        if (!et_isa_runs_here((enum et_isa)isa) || !et_cpu_choose(et_isa_name((enum et_isa)isa), &cpu))
            continue;
        printf("%s\n", et_isa_name(cpu.isa));
        for (int64_t v = 1; v < 70; v++)
            for (int any_bits = 0; any_bits < 2; any_bits++) {
                test_compare(3, v, any_bits);
                test_codes(3, v, any_bits);
            }
        test_compare(5, 4099, false);
        test_codes(5, 4099, false);
    }
    for (size_t i = 0; et_ggml_type_at(i, &type); i++)
        for (int dtype = ET_F32; dtype <= ET_BF16; dtype++)
            if (strncmp(type.name, "iq1", 3) && strncmp(type.name, "iq2", 3)) /* minutes to build their tables */
                test_quantize(type, (enum et_dtype)dtype, 1 + 40 * (dtype == ET_F16));
    struct et_amx amx;
    et_amx_probe(true, &amx);
    printf("amx: %s\n%s\n", amx.reason, failures ? "FAILED" : "ok");
    return failures != 0;
}
