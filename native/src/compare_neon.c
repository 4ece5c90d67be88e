/* The row kernels for AArch64, whose baseline includes NEON: no flags. */
#include "compare_kernel.h"

const struct et_row_kernels et_rows_neon = ET_ROW_KERNELS;
