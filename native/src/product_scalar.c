/* The product kernel compiled for the baseline; fmaf rounds once wherever it runs. */
#include "simd_scalar.h"

#include "product_kernel.h"

const et_add_panel_fn et_add_panel_scalar = add_panel;
