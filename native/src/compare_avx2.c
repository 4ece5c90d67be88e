/* The row kernels compiled for AVX2 (-mavx2, set in CMakeLists.txt). */
#include "compare_kernel.h"

const struct et_row_kernels et_rows_avx2 = ET_ROW_KERNELS;
