/* The kernels of each instruction set, and the choice between them.
 *
 * CMake compiles every *_kernel.c once for each instruction set, with that set's flags and with ET_ISA defined as its
 * name (scalar, avx2, avx512 or neon). Such a file ends with the definition of one table, ET_KERNELS(its name);
 * dispatch.c collects the tables.
 */
#ifndef EDGETUNE_DISPATCH_H
#define EDGETUNE_DISPATCH_H

#include "bnb_kernel.h"
#include "compare_kernel.h"
#include "edgetune.h"
#include "nbits_kernel.h"
#include "product_kernel.h"
#include "quantize_kernel.h"

struct et_kernels {
    const struct et_bnb_kernels *bnb;
    const struct et_compare_kernels *compare;
    const struct et_nbits_kernels *nbits;
    const struct et_product_kernels *product;
    const struct et_quantize_kernels *quantize;
};

/* By instruction set; the members are NULL for those that this architecture does not have. */
extern const struct et_kernels et_kernel_table[ET_ISA_COUNT];

/* The kernels of the instruction set in use. */
static inline const struct et_kernels *et_kernels(void) { return &et_kernel_table[et_isa_in_use]; }

#ifdef ET_ISA
#define ET_JOIN(left, right) left##right
#define ET_JOIN_EXPANDED(left, right) ET_JOIN(left, right)
/* The name of the table of this instruction set: ET_KERNELS(bnb) is et_bnb_avx2 where ET_ISA is avx2. */
#define ET_KERNELS(concern) ET_JOIN_EXPANDED(et_##concern##_, ET_ISA)
#endif

#endif
