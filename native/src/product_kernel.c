/* rows + left right for one panel of columns, compiled once for each instruction set (see dispatch.h). */
#include "product_kernel.h"

#include <float.h>

#include "dispatch.h"
#include "simd.h"

enum {
    TILE_ROWS = 4,
    TILE_VECTORS = LANES == 8 ? 2 : 4, /* sums and one row of the panel fill the registers */
    TILE_COLUMNS = TILE_VECTORS * LANES
};

/* Adds to `count` rows from `row` on, columns c .. c + TILE_COLUMNS - 1 of the panel. */
static inline vm add_tile(const struct et_panel *panel, int64_t row, int count, int c) {
    vf sum[TILE_ROWS][TILE_VECTORS];
    const float *left[TILE_ROWS];
    vm finite = vm_all();
    for (int i = 0; i < TILE_ROWS; i++) {
        left[i] = panel->left + (row + (i < count ? i : 0)) * panel->r;
        for (int v = 0; v < TILE_VECTORS; v++)
            sum[i][v] = vf_set(0);
    }
    for (int64_t q = 0; q < panel->r; q++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            vf right = vf_load(panel->right + q * ET_PANEL + c + v * LANES);
            for (int i = 0; i < TILE_ROWS; i++)
                sum[i][v] = vf_fma(vf_set(left[i][q]), right, sum[i][v]);
        }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            int64_t at = (row + i) * panel->stride + c + v * LANES;
            vf merged = vf_add(vf_load_as(panel->dtype, panel->rows, at), sum[i][v]);
            finite = vm_and(finite, vf_le(vf_abs(merged), vf_set(FLT_MAX)));
            vf_store(panel->out + at, merged);
        }
    return finite;
}

static bool add_panel(const struct et_panel *panel) {
    vm finite = vm_all();
    for (int64_t row = 0; row < panel->n; row += TILE_ROWS)
        for (int c = 0; c < ET_PANEL; c += TILE_COLUMNS) {
            int count = (int)(panel->n - row < TILE_ROWS ? panel->n - row : TILE_ROWS);
            finite = vm_and(finite, add_tile(panel, row, count, c));
        }
    return vm_bits(vm_not(finite)) == 0;
}

const struct et_product_kernels ET_KERNELS(product) = {add_panel};
