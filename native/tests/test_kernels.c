/* Runs the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on allocations of the exact size, so that a
 * read or write past an end is found. The Python tests check values; this one checks memory, arithmetic and threads.
 *
 *   test_kernels path/to/libggml-base.so
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "edgetune.h"

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

/* libggml itself is not sanitized, but the exact size of our buffers bounds its reads and writes. */
static void test_quantize(struct et_ggml_type type, enum et_dtype dtype, int64_t n) {
    const int64_t k = 2 * type.block_size > 64 ? 2 * type.block_size : 64;
    size_t row_bytes = (size_t)(k / type.block_size) * type.block_bytes;
    float *floats = random_floats(n * k, false), *weights = random_floats(k, false),
          *back = malloc((size_t)(n * k) * 4);
    uint16_t *halves = malloc((size_t)(n * k) * sizeof *halves);
    for (int64_t i = 0; i < n * k; i++)
        halves[i] =
            dtype == ET_F16 ? (uint16_t)(random_bits() & 0xbbff) : (uint16_t)(0x3f00 | (random_bits() & 0x80ff));
    for (int64_t i = 0; i < k; i++)
        weights[i] = fabsf(weights[i]);
    uint8_t *one = malloc((size_t)n * row_bytes), *many = malloc((size_t)n * row_bytes);
    struct et_quantize_job job = {.type = type.id,
                                  .dtype = dtype,
                                  .rows = dtype == ET_F32 ? (void *)floats : halves,
                                  .weights = weights,
                                  .out = one,
                                  .n = n,
                                  .k = k,
                                  .row_bytes = row_bytes};
    CHECK(et_quantize(&job, 1).status == ET_OK);
    job.out = many;
    CHECK(et_quantize(&job, 4).status == ET_OK);
    CHECK(memcmp(one, many, (size_t)n * row_bytes) == 0);
    struct et_dequantize_job undo = {
        .type = type.id, .blocks = one, .out = back, .n = n, .k = k, .row_bytes = row_bytes};
    CHECK(et_dequantize(&undo, 3).status == ET_OK);
    free(floats), free(weights), free(back), free(halves), free(one), free(many);
}

/* [count] of the type: any bits, or values from -4 to 4. */
static void *random_logits(int64_t count, enum et_dtype dtype, bool any_bits) {
    if (dtype == ET_F32)
        return random_floats(count, any_bits);
    uint16_t *out = malloc((size_t)count * sizeof *out);
    for (int64_t i = 0; i < count; i++)
        out[i] = (uint16_t)(random_bits() & (any_bits ? 0xffff : dtype == ET_F16 ? 0xc3ff : 0xbfff));
    return out;
}

static double *numbers(int64_t n) { return malloc((size_t)n * sizeof(double)); }

static void test_compare(int64_t n, int64_t v, enum et_dtype dtype_a, enum et_dtype dtype_b, bool any_bits) {
    void *a = random_logits(n * v, dtype_a, any_bits), *b = random_logits(n * v, dtype_b, any_bits);
    int64_t *targets = malloc((size_t)n * sizeof *targets);
    uint8_t *same = malloc((size_t)n);
    for (int64_t i = 0; i < n; i++)
        targets[i] = random_bits() % v;
    struct et_compare_job job = {.reference = a,
                                 .other = b,
                                 .reference_dtype = dtype_a,
                                 .other_dtype = dtype_b,
                                 .targets = targets,
                                 .kld = numbers(n),
                                 .same_top = same,
                                 .nll_reference = numbers(n),
                                 .nll = numbers(n),
                                 .reverse_kld = numbers(n),
                                 .entropy_reference = numbers(n),
                                 .entropy = numbers(n),
                                 .top_k_overlap = numbers(n),
                                 .n = n,
                                 .v = v,
                                 .top_k = 1 + random_bits() % v};
    double *out[] = {job.kld,     job.nll_reference, job.nll, job.reverse_kld, job.entropy_reference,
                     job.entropy, job.top_k_overlap};
    enum { OUTPUTS = sizeof out / sizeof *out };
    struct et_outcome outcome = et_compare(&job, 3);
    CHECK(any_bits || outcome.status == ET_OK);
    for (int64_t i = 0; outcome.status == ET_OK && i < n; i++)
        for (int k = 0; k < OUTPUTS; k++)
            CHECK(same[i] <= 1 && out[k][i] >= 0 && (any_bits || isfinite(out[k][i])));
    job.other = a, job.other_dtype = dtype_a;
    outcome = et_compare(&job, 2);
    for (int64_t i = 0; outcome.status == ET_OK && i < n; i++)
        CHECK(same[i] == 1 && job.kld[i] == 0 && job.reverse_kld[i] == 0 && job.top_k_overlap[i] == 1);
    targets[n - 1] = v;
    CHECK(et_compare(&job, 1).status != ET_OK);
    free(a), free(b), free(targets), free(same);
    for (int k = 0; k < OUTPUTS; k++)
        free(out[k]);
}

static void test_codes(int64_t n, int64_t v, enum et_dtype dtype, bool any_bits) {
    void *logits = random_logits(n * v, dtype, any_bits);
    float *scale = calloc((size_t)n, 4), *low = calloc((size_t)n, 4), *back = malloc((size_t)(n * v) * 4);
    uint16_t *codes = calloc((size_t)(n * v), 2);
    struct et_encode_job job = {
        .logits = logits, .dtype = dtype, .scale = scale, .min_log_prob = low, .codes = codes, .n = n, .v = v};
    CHECK(et_encode(&job, 2).status == ET_OK || any_bits);
    struct et_decode_job undo = {scale, low, codes, back, n, v};
    CHECK(et_decode(&undo, 2).status == ET_OK);
    for (int64_t i = 0; !any_bits && i < n * v; i++)
        CHECK(back[i] <= 1e-3f);
    free(logits), free(scale), free(low), free(codes), free(back);
}

static void check_nbits_back(const struct et_nbits_quantize_job *job) {
    float *back = malloc((size_t)(job->n * job->k) * sizeof *back);
    struct et_nbits_dequantize_job undo = {.format = job->format,
                                           .codes = job->codes,
                                           .scales = job->scales,
                                           .zero_points = job->zero_points,
                                           .out = back,
                                           .n = job->n,
                                           .k = job->k};
    CHECK(et_nbits_dequantize(&undo, 2).status == ET_OK);
    for (int64_t i = 0; job->dtype == ET_F32 && i < job->n * job->k; i++)
        CHECK(fabsf(back[i] - ((const float *)job->rows)[i]) <= 1.0f); /* values below 4: a step is some 0.5 at most */
    free(back);
}

static void test_nbits(struct et_nbits_format format, enum et_dtype dtype, int64_t n, int64_t k, bool any_bits) {
    int64_t k_blocks = (k - 1) / format.block_size + 1;
    size_t code_bytes = (size_t)(n * k_blocks * (format.block_size * format.bits / 8));
    size_t scale_bytes = (size_t)(n * k_blocks) * (format.half_scales ? 2 : 4);
    size_t zero_bytes = (size_t)(n * ((k_blocks * format.bits + 7) / 8));
    float *floats = random_floats(n * k, any_bits), *weights = random_floats(k, false);
    uint16_t *halves = malloc((size_t)(n * k) * sizeof *halves);
    for (int64_t i = 0; i < n * k; i++)
        halves[i] = (uint16_t)(random_bits() & (any_bits ? 0xffff : 0xbbff));
    for (int64_t i = 0; i < n * k && n % 2; i++) { /* of any size, but finite: a bit of the exponent is cleared */
        uint32_t bits;
        memcpy(&bits, &floats[i], sizeof bits);
        bits &= 0xff7fffff;
        memcpy(&floats[i], &bits, sizeof bits);
    }
    for (int64_t i = 0; i < k; i++)
        weights[i] = fabsf(weights[i]);
    uint8_t *codes = malloc(code_bytes), *zeros = malloc(zero_bytes);
    void *scales = malloc(scale_bytes);
    struct et_nbits_quantize_job job = {.format = format,
                                        .dtype = dtype,
                                        .codes = codes,
                                        .scales = scales,
                                        .n = n,
                                        .k = k,
                                        .rows = dtype == ET_F32 ? (void *)floats : halves,
                                        .zero_points = format.symmetric ? NULL : zeros};
    for (int i = 0; i < 3; i++) {
        job.search = i > 0;
        job.weights = i > 1 ? weights : NULL;
        struct et_outcome outcome = et_nbits_quantize(&job, 3);
        CHECK(any_bits || outcome.status == ET_OK);
        CHECK(n % 2 == 0 || dtype != ET_F32 || format.half_scales || outcome.status == ET_OK);
        if (outcome.status == ET_OK && !any_bits && !job.weights)
            check_nbits_back(&job);
    }
    free(floats), free(weights), free(halves), free(codes), free(zeros), free(scales);
}

static void test_all_nbits(void) {
    for (int bits = 4; bits <= 8; bits += 4)
        for (int size = 16; size <= 256; size *= 2)
            for (int flags = 0; flags < 8; flags++)
                for (int dtype = ET_F32; dtype <= ET_BF16; dtype++) {
                    struct et_nbits_format format = {bits, size, (flags & 1) != 0, (flags & 2) != 0};
                    test_nbits(format, (enum et_dtype)dtype, 1 + flags, 2 * size + 1 + flags, (flags & 4) != 0);
                }
}

/* Exactly sized buffers for every step of the 4-bit formats; one thread and many must give the same. */
static void test_four_bit(int64_t n, int64_t k, int64_t blocksize, enum et_dtype dtype,
                          const struct et_four_bit *type) {
    const int64_t count = n * k, blocks = et_blocks(count, blocksize), bytes = et_blocks(count, 2);
    float *floats = random_floats(count, false), *map = random_floats(256, false);
    float *absmax = malloc((size_t)blocks * 4), *scales = malloc((size_t)blocks * 4);
    float *nested = malloc((size_t)et_blocks(blocks, 256) * 4);
    float *out = malloc((size_t)count * 4), *back = malloc((size_t)count * 4);
    uint16_t *halves = malloc((size_t)count * sizeof *halves);
    uint8_t *codes = malloc((size_t)blocks), *packed = malloc((size_t)bytes), *nearest = malloc(ET_NEAREST_SIZE);
    for (int64_t i = 0; i < count; i++)
        halves[i] = (uint16_t)(random_bits() & 0xbbff); /* finite in both half formats */
    for (int i = 0; i < ET_NEAREST_SIZE; i++)
        nearest[i] = (uint8_t)(i >> 8);
    const void *rows = dtype == ET_F32 ? (void *)floats : halves;

    struct et_absmax_job absmax_job = {dtype, rows, absmax, count, blocksize, k};
    CHECK(et_absmax(&absmax_job, 3).status == ET_OK);
    float offset = et_torch_mean(absmax, blocks, 2);
    struct et_nest_job nest = {absmax, nearest, codes, nested, blocks, 256, offset};
    CHECK(et_nest(&nest, 3).status == ET_OK);
    struct et_unnest_job unnest = {codes, map, nested, scales, blocks, 256, offset};
    CHECK(et_unnest(&unnest, 3).status == ET_OK);
    struct et_quantize_4bit_job quantize = {type, dtype, rows, absmax, packed, count, blocksize};
    CHECK(et_quantize_4bit(&quantize, 4).status == ET_OK);
    struct et_dequantize_4bit_job dequantize = {type, packed, scales, dtype, out, count, blocksize};
    CHECK(et_dequantize_4bit(&dequantize, 1).status == ET_OK);
    struct et_roundtrip_4bit_job roundtrip = {quantize, dequantize};
    roundtrip.from.packed = NULL, roundtrip.to.packed = NULL, roundtrip.to.out = back;
    CHECK(et_roundtrip_4bit(&roundtrip, 4).status == ET_OK);
    CHECK(memcmp(out, back, (size_t)count * 4) == 0);

    floats[count - 1] = NAN, halves[count - 1] = 0x7fff;
    struct et_outcome outcome = et_absmax(&absmax_job, 2);
    CHECK(outcome.status == ET_NOT_FINITE && outcome.row == n - 1);
    free(floats), free(absmax), free(scales), free(nested), free(out), free(back), free(map), free(halves);
    free(codes), free(packed), free(nearest);
}

static void test_four_bits(void) {
    struct et_four_bit ascending, mixed;
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = (float)(i - 7) / 8.0f;
    et_four_bit_of(values, &ascending);
    CHECK(ascending.ascending && ascending.bounds[7] == 0.0625f);
    for (int i = 0; i < 16; i++)
        values[i] = (float)(i & 7) / (i < 8 ? 7.0f : -7.0f);
    et_four_bit_of(values, &mixed);
    CHECK(!mixed.ascending && mixed.codes[0] == 15 && mixed.codes[7] == 0);
    CHECK(mixed.codes[8] == 8 && mixed.codes[15] == 7);
    const int64_t blocksizes[] = {32, 64, 256, ET_LARGEST_BLOCK};
    for (int b = 0; b < 4; b++)
        for (int dtype = ET_F32; dtype <= ET_BF16; dtype++) {
            for (int64_t k = 1; k < 140; k += 3)
                test_four_bit(3, k, blocksizes[b], (enum et_dtype)dtype, k % 2 ? &ascending : &mixed);
            test_four_bit(41, 4099, blocksizes[b], (enum et_dtype)dtype, &ascending);
        }
}

static void test_int8(int64_t n, int64_t k) {
    float *scb = random_floats(n, false), *out = malloc((size_t)(n * k) * 4);
    int8_t *codes = malloc((size_t)(n * k));
    for (int64_t i = 0; i < n * k; i++)
        codes[i] = (int8_t)random_bits();
    for (int dtype = ET_F32; dtype <= ET_BF16; dtype++) {
        struct et_dequantize_int8_job job = {codes, scb, (enum et_dtype)dtype, out, n, k};
        CHECK(et_dequantize_int8(&job, 3).status == ET_OK);
        CHECK(fabsf(out[n * k - 1] - codes[n * k - 1] * scb[n - 1] / 127) <= fabsf(scb[n - 1]) / 100);
    }
    free(scb), free(out), free(codes);
}

static void test_torch_mean(void) {
    for (int64_t count = 1; count < 300000; count += count / 3 + 1) {
        float *ones = malloc((size_t)count * 4);
        for (int64_t i = 0; i < count; i++)
            ones[i] = 1.0f;
        for (int threads = 1; threads < 20; threads += 3)
            CHECK(et_torch_mean(ones, count, threads) == 1.0f); /* exact in any order, if each is added once */
        free(ones);
    }
    float *many = calloc(32768, 4);
    many[0] = 32768.0f;
    CHECK(et_torch_mean(many, 32768, 1000000) == 1.0f);
    free(many);
}

/* Every pair of types for each length; a few rows, so that some of any bits are distributions. */
static void test_logits(int64_t n, int64_t v, bool any_bits) {
    for (int a = ET_F32; a <= ET_BF16; a++)
        for (int b = ET_F32; b <= ET_BF16; b++)
            test_compare(n, v, (enum et_dtype)a, (enum et_dtype)b, any_bits);
    for (int dtype = ET_F32; dtype <= ET_BF16; dtype++)
        test_codes(n, v, (enum et_dtype)dtype, any_bits);
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
        fprintf(stderr, "usage: test_kernels path/to/libggml-base.so%s%s\n", argc == 2 ? "\n" : "",
                argc == 2 ? message : "");
        return 2;
    }
    test_threads();
    for (int isa = 0; isa < ET_ISA_COUNT; isa++) {
        if (!et_isa_runs_here((enum et_isa)isa) || !et_cpu_choose(et_isa_name((enum et_isa)isa), &cpu))
            continue;
        printf("%s\n", et_isa_name(cpu.isa));
        for (int64_t v = 1; v < 70; v++)
            for (int any_bits = 0; any_bits < 2; any_bits++) {
                test_logits(1, v, any_bits);
                test_logits(3, v, any_bits);
            }
        test_logits(3, 4099, false);
        test_logits(2, 17000, false);
        test_logits(2, 17000, true);
        test_all_nbits();
        for (size_t i = 0; et_ggml_type_at(i, &type); i++)
            for (int dtype = ET_F32; dtype <= ET_BF16; dtype++)
                if (strncmp(type.name, "iq1", 3) && strncmp(type.name, "iq2", 3)) /* minutes to build their tables */
                    for (int n = 1; n < 100; n += dtype == ET_F16 ? 33 : 97)
                        test_quantize(type, (enum et_dtype)dtype, n);
        test_four_bits();
        for (int64_t k = 1; k < 70; k++)
            test_int8(3, k);
    }
    test_torch_mean();
    struct et_amx amx;
    et_amx_probe(true, &amx);
    printf("amx: %s\n%s\n", amx.reason, failures ? "FAILED" : "ok");
    return failures != 0;
}
