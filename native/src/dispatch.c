/* One row for each instruction set. The tables themselves are defined at the end of the *_kernel.c. */
#include "dispatch.h"

#define DECLARE(isa)                                                                                                   \
    extern const struct et_bnb_kernels et_bnb_##isa;                                                                   \
    extern const struct et_compare_kernels et_compare_##isa;                                                           \
    extern const struct et_nbits_kernels et_nbits_##isa;                                                               \
    extern const struct et_product_kernels et_product_##isa;                                                           \
    extern const struct et_quantize_kernels et_quantize_##isa;
#define ROW(isa) {&et_bnb_##isa, &et_compare_##isa, &et_nbits_##isa, &et_product_##isa, &et_quantize_##isa}

DECLARE(scalar)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#elif defined(__aarch64__)
DECLARE(neon)
#endif

const struct et_kernels et_kernel_table[ET_ISA_COUNT] = {
    [ET_SCALAR] = ROW(scalar),
#if defined(__x86_64__)
    [ET_AVX2] = ROW(avx2),
    [ET_AVX512] = ROW(avx512),
#elif defined(__aarch64__)
    [ET_NEON] = ROW(neon),
#endif
};
