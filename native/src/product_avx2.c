/* The product kernel compiled for AVX2 and FMA (flags set in CMakeLists.txt). */
#include "simd_avx2.h"

#include "product_kernel.h"

const et_add_panel_fn et_add_panel_avx2 = add_panel;
