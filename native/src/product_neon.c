/* The product kernel with NEON, which every AArch64 CPU has. */
#include "simd_neon.h"

#include "product_kernel.h"

const et_add_panel_fn et_add_panel_neon = add_panel;
