/* Quantizing many blocks at once, one block per SIMD lane: what quantize_kernel.c gives for each instruction set.
 *
 * Each lane does the operations of libggml's own quantizer on its block, in libggml's order, so nothing is added up across
 * lanes and the bytes are the same. Where a shorter way is taken, it is because the result is known to be equal for all
 * blocks within stated bounds (PROVEN_MAX and others in quantize_search.h). A block outside of them, which may hold NaN, inf
 * or denormals, is reported back, and libggml itself quantizes it.
 */
#ifndef EDGETUNE_QUANTIZE_KERNEL_H
#define EDGETUNE_QUANTIZE_KERNEL_H

#include "edgetune.h"

/* The most blocks that a group has, and the most weights and bytes of a block. */
enum { ET_MAX_GROUP = 64, ET_MAX_BLOCK = 256, ET_MAX_BLOCK_BYTES = 256 };

/* A full group of blocks; one that has fewer repeats one of them and lets it be written elsewhere. */
struct et_group {
    enum et_dtype dtype;
    const void *x[ET_MAX_GROUP];    /* each [block_size] of dtype */
    const void *w[ET_MAX_GROUP];    /* each f32 [block_size], importance weights; not read by the plain kernels */
    float sigma2[ET_MAX_GROUP];     /* mean square of the row; read by the weighted kernels of block size 32 only */
    uint8_t *out[ET_MAX_GROUP];     /* each [block_bytes] */
};

/* Quantizes a group and returns the blocks (bit b: block b) whose bytes are not to be used: libggml has to write them. */
typedef uint64_t (*et_group_fn)(const struct et_group *group);

struct et_group_kernels {
    int type;         /* enum ggml_type */
    int block_size;   /* weights of a block */
    int block_bytes;
    int group;        /* blocks in a group */
    bool row_sigma2;  /* does `weighted` read sigma2? Then a block cannot be quantized apart from its row. */
    et_group_fn plain, weighted;
};

/* The GGUF types that have kernels. */
struct et_quantize_kernels {
    const struct et_group_kernels *types;
    int count;
};

#endif
