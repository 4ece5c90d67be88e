/* Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights, STREAMS x LANES of them at once. Included by
 * quantize_kernel.c.
 *
 * Without weights, the scale follows from the extremes. With weights, it is searched, and the weights depend on the
 * mean square of the whole row.
 */
#ifndef EDGETUNE_QUANTIZE_32_H
#define EDGETUNE_QUANTIZE_32_H

/* The result for LANES blocks. */
struct block_levels {
    vf d, m; /* m is the minimum, in the formats that have one */
    vi levels[BLOCK];
    vm proven;
};

/* Offsets in a block; -1: the format does not have it. */
struct block_layout {
    int minimum, fifth_bits, levels;
};

static const struct block_layout Q4_0_LAYOUT = {-1, -1, 2}, Q4_1_LAYOUT = {2, -1, 4};
static const struct block_layout Q5_0_LAYOUT = {-1, 2, 6}, Q5_1_LAYOUT = {2, 4, 8};

INLINE void write_block(const struct block_levels *block, struct block_layout layout, uint8_t *const *out) {
    lane_floats d, m;
    vi words[4];
    vf_store(d, block->d);
    vf_store(m, block->m);
    for (int lane = 0; lane < LANES; lane++) {
        put_f16(out[lane], d[lane]);
        if (layout.minimum >= 0)
            put_f16(out[lane] + layout.minimum, m[lane]);
    }
    if (layout.fifth_bits >= 0) {
        vi bits = vi_set(0);
        for (int i = 0; i < BLOCK; i++)
            bits = vi_or(bits, vi_shl(vi_shr(block->levels[i], 4), i));
        store_words(&bits, 1, out, layout.fifth_bits);
    }
    for (int i = 0; i < 4; i++)
        words[i] = nibbles_of(block->levels + 4 * i, 16);
    store_words(words, 4, out, layout.levels);
}

/* Lanes where no value is too large, and the extent is 0 or its inverse does not overflow. */
INLINE vm is_usual(const vf *x, vf extent) {
    vm usual = vm_or(vf_eq(extent, vf_set(0)), vf_le(vf_set(PROVEN_RANGE), extent));
    return vm_and(are_proven(x, BLOCK), usual);
}

/* Q4_0, Q5_0: the element of largest size gets level 0, which is -half. */
INLINE void plain_scale(const vf *x, float half, struct block_levels *block) {
    vf amount, peak = peak_of(x, BLOCK, &amount);
    block->proven = is_usual(x, amount);
    block->d = block->m = vf_div(peak, vf_set(-half));
    vf inverse = inverse_of(block->d);
    for (int i = 0; i < BLOCK; i++) {
        vi level = vi_trunc(vf_add(vf_mul(x[i], inverse), vf_set(half + 0.5f)));
        block->levels[i] = vi_min(level, vi_set(2 * (int)half - 1));
    }
}

/* Q4_1, Q5_1: from the minimum to the maximum. */
INLINE void plain_scale_and_min(const vf *x, float top, struct block_levels *block) {
    vf low = vf_set(0x1.fffffep127f), high = vf_set(-0x1.fffffep127f);
    for (int i = 0; i < BLOCK; i++) {
        low = vf_min(x[i], low);
        high = vf_max(x[i], high);
    }
    block->proven = is_usual(x, vf_sub(high, low));
    block->d = vf_div(vf_sub(high, low), vf_set(top));
    block->m = low;
    vf inverse = inverse_of(block->d);
    for (int i = 0; i < BLOCK; i++) {
        vi level = vi_trunc(vf_add(vf_mul(vf_sub(x[i], low), inverse), vf_set(0.5f)));
        block->levels[i] = vi_min(level, vi_set((int)top));
    }
}

INLINE uint64_t plain_32(const struct et_group *group, float half, float top, struct block_layout layout) {
    uint64_t not_proven = 0;
    for (int s = 0; s < STREAMS; s++) {
        vf x[BLOCK];
        struct block_levels block;
        load_x(group, s * LANES, BLOCK, x);
        if (layout.minimum >= 0)
            plain_scale_and_min(x, top, &block);
        else
            plain_scale(x, half, &block);
        write_block(&block, layout, group->out + s * LANES);
        not_proven |= lanes_not(block.proven) << (s * LANES);
    }
    return not_proven;
}

INLINE uint64_t weighted_32(const struct et_group *group, float half, float top, struct block_layout layout) {
    vf x[STREAMS * BLOCK], w[STREAMS * BLOCK];
    struct scale_fit scales[STREAMS];
    struct min_fit mins[STREAMS];
    struct block_levels block;
    uint64_t not_proven = 0;
    for (int s = 0; s < STREAMS; s++) {
        load_x(group, s * LANES, BLOCK, x + s * BLOCK);
        load_w(group, s * LANES, BLOCK, w + s * BLOCK);
        weigh(x + s * BLOCK, w + s * BLOCK, BLOCK, vf_load(group->sigma2 + s * LANES));
    }
    if (layout.minimum >= 0)
        search_scale_and_min(x, w, (struct min_search){BLOCK, top, -0.9f, 0.05f, 36, false}, mins);
    else
        search_scale(x, w, BLOCK, half, STREAMS, scales);
    for (int s = 0; s < STREAMS; s++) {
        bool has_min = layout.minimum >= 0;
        block.d = has_min ? mins[s].scale : scales[s].scale;
        block.m = has_min ? mins[s].minimum : block.d;
        block.proven = are_proven(x + s * BLOCK, BLOCK);
        if (has_min)
            block.proven = vm_and(block.proven, mins[s].proven);
        for (int i = 0; i < BLOCK; i++)
            block.levels[i] = has_min ? level_of_min_fit(x[s * BLOCK + i], mins[s], top)
                                      : level_of_scale_fit(x[s * BLOCK + i], scales[s], half);
        write_block(&block, layout, group->out + s * LANES);
        not_proven |= lanes_not(block.proven) << (s * LANES);
    }
    return not_proven;
}

/* roundf for |a| < 2^22: half away from zero. Adding the largest float below 1/2 carries every half, and nothing
 * else. */
INLINE vi round_half_away(vf a) {
    vi level = vi_trunc(vf_add(vf_abs(a), vf_set(0x1.fffffep-2f)));
    return vi_select(vf_lt(a, vf_set(0)), vi_sub(vi_set(0), level), level);
}

static uint64_t q8_0_plain(const struct et_group *group) {
    uint64_t not_proven = 0;
    for (int s = 0; s < STREAMS; s++) {
        vf x[BLOCK], amount = vf_set(0);
        vi words[8];
        lane_floats d;
        load_x(group, s * LANES, BLOCK, x);
        for (int i = 0; i < BLOCK; i++)
            amount = vf_max(amount, vf_abs(x[i]));
        vf scale = vf_div(amount, vf_set(127)), inverse = inverse_of(scale);
        for (int i = 0; i < 8; i++) {
            vi byte[4];
            for (int b = 0; b < 4; b++)
                byte[b] = vi_and(round_half_away(vf_mul(x[4 * i + b], inverse)), vi_set(0xff));
            words[i] = word_of(byte[0], byte[1], byte[2], byte[3]);
        }
        store_words(words, 8, group->out + s * LANES, 2);
        vf_store(d, scale);
        for (int lane = 0; lane < LANES; lane++)
            put_f16(group->out[s * LANES + lane], d[lane]);
        not_proven |= lanes_not(is_usual(x, amount)) << (s * LANES);
    }
    return not_proven;
}

INLINE uint64_t q4_0(const struct et_group *group, bool weighted) {
    return (weighted ? weighted_32 : plain_32)(group, 8, 0, Q4_0_LAYOUT);
}

INLINE uint64_t q4_1(const struct et_group *group, bool weighted) {
    return (weighted ? weighted_32 : plain_32)(group, 0, 15, Q4_1_LAYOUT);
}

INLINE uint64_t q5_0(const struct et_group *group, bool weighted) {
    return (weighted ? weighted_32 : plain_32)(group, 16, 0, Q5_0_LAYOUT);
}

INLINE uint64_t q5_1(const struct et_group *group, bool weighted) {
    return (weighted ? weighted_32 : plain_32)(group, 0, 31, Q5_1_LAYOUT);
}

PLAIN_AND_WEIGHTED(q4_0)
PLAIN_AND_WEIGHTED(q4_1)
PLAIN_AND_WEIGHTED(q5_0)
PLAIN_AND_WEIGHTED(q5_1)

#endif
