/* Quantizing many blocks at once, one block per SIMD lane, implemented for each instruction set by quantize_kernel.c.
 *
 * Each lane performs the operations of libggml's quantizer on its block, in libggml's order. Nothing is added across
 * lanes, so the bytes are the same. A shorter way is used only where the result is proven equal for all blocks within
 * stated bounds (PROVEN_MAX and others in quantize_search.h). A block outside of them, which may have NaN, infinities
 * or denormals, is reported, and libggml quantizes it.
 */
#ifndef EDGETUNE_QUANTIZE_KERNEL_H
#define EDGETUNE_QUANTIZE_KERNEL_H

#include "edgetune.h"

/* The largest number of blocks in a group, and of weights and bytes in a block. */
enum { ET_MAX_GROUP = 64, ET_MAX_BLOCK = 256, ET_MAX_BLOCK_BYTES = 256 };

/* A full group of blocks. If there are fewer, the last one is repeated and its copies are discarded. */
struct et_group {
    enum et_dtype dtype;
    const void *x[ET_MAX_GROUP]; /* each [block_size] of dtype */
    const void *w[ET_MAX_GROUP]; /* each f32 [block_size], importance weights; not read by the plain kernels */
    float sigma2[ET_MAX_GROUP];  /* mean square of the row; read by the weighted kernels of block size 32 only */
    uint8_t *out[ET_MAX_GROUP];  /* each [block_bytes] */
};

/* Quantizes a group. Returns the blocks (bit b: block b) that are not proven: libggml has to quantize them. */
typedef uint64_t (*et_group_fn)(const struct et_group *group);

struct et_group_kernels {
    int type;       /* enum ggml_type */
    int block_size; /* weights of a block */
    int block_bytes;
    int group;       /* blocks in a group */
    bool row_sigma2; /* `weighted` reads sigma2: a block depends on its row */
    et_group_fn plain, weighted;
};

/* The GGUF types that have kernels. */
struct et_quantize_kernels {
    const struct et_group_kernels *types;
    int count;
};

#endif
