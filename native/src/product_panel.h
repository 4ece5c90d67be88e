/* What product.c and the kernels of product_<isa>.c agree on. */
#ifndef EDGETUNE_PRODUCT_PANEL_H
#define EDGETUNE_PRODUCT_PANEL_H

#include "edgetune.h"

enum { ET_PANEL = 64 }; /* columns that are worked on at once, so that their part of `right` stays in the first cache */

struct et_panel {
    enum et_dtype dtype;
    const void *rows;   /* [n, ET_PANEL] of dtype in rows of `stride` */
    const float *left;  /* [n, r] */
    const float *right; /* [r, ET_PANEL], contiguous */
    float *out;         /* like rows */
    int64_t n, r, stride;
};

/* out = rows + left right; false if something of it is not finite. */
typedef bool (*et_add_panel_fn)(const struct et_panel *panel);

extern const et_add_panel_fn et_add_panel_scalar, et_add_panel_avx2, et_add_panel_avx512, et_add_panel_neon;

#endif
