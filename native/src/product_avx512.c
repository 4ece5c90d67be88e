/* The product kernel compiled for AVX-512 F, BW, DQ, VL (flags set in CMakeLists.txt). */
#include "simd_avx512.h"

#include "product_kernel.h"

const et_add_panel_fn et_add_panel_avx512 = add_panel;
