/* The row kernels compiled for the baseline of the target (SSE2 on x86-64, NEON on AArch64). */
#include "compare_kernel.h"

const struct et_row_kernels et_rows_scalar = ET_ROW_KERNELS;
