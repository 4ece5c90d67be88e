/* The row kernels compiled for AVX-512 F, BW, DQ, VL (flags set in CMakeLists.txt). */
#include "compare_kernel.h"

const struct et_row_kernels et_rows_avx512 = ET_ROW_KERNELS;
