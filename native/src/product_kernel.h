/* rows + left right for one panel of columns, implemented for each instruction set by product_kernel.c. */
#ifndef EDGETUNE_PRODUCT_KERNEL_H
#define EDGETUNE_PRODUCT_KERNEL_H

#include "edgetune.h"

enum { ET_PANEL = 64 }; /* columns at once, so that their part of `right` stays in the first-level cache */

struct et_panel {
    enum et_dtype dtype;
    const void *rows;   /* [n, ET_PANEL] of dtype in rows of `stride` */
    const float *left;  /* [n, r] */
    const float *right; /* [r, ET_PANEL], contiguous */
    float *out;         /* like rows */
    int64_t n, r, stride;
};

struct et_product_kernels {
    /* out = rows + left right; false if an element of it is not finite. */
    bool (*add_panel)(const struct et_panel *panel);
};

#endif
