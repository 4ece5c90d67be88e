/* IQ4_NL (blocks of 32) and IQ4_XS (super-blocks of 8 x 32): sixteen levels at unequal distances. Included by
 * quantize_kernel.c. The result is that of libggml's quantize_row_iq4_nl_impl with its 15 tries. */
#ifndef EDGETUNE_QUANTIZE_IQ4_H
#define EDGETUNE_QUANTIZE_IQ4_H

enum { IQ4_TRIES = 7, IQ4_XS_LEVELS = 8 };

INLINE void add_iq4_sums(const vf *x, const vf *w, const vf *inverse, struct scale_sums *sums /* [STREAMS] */) {
    vf lx[STREAMS], l2[STREAMS];
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++)
        lx[s] = l2[s] = vf_set(0);
    for (int i = 0; i < 32; i++)
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            vf level = vf_iq4_nearest(vf_mul(inverse[s], x[32 * s + i]));
            vf wl = vf_mul(w[32 * s + i], level);
            lx[s] = vf_add(lx[s], vf_mul(wl, x[32 * s + i]));
            l2[s] = vf_add(l2[s], vf_mul(wl, level));
        }
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++)
        sums[s] = (struct scale_sums){lx[s], l2[s]};
}

/* The scale of each of x [STREAMS][32]. */
INLINE void search_iq4(const vf *x, const vf *w, vf *scale /* [STREAMS] */) {
    vf peak[STREAMS], inverse[STREAMS], best[STREAMS];
    struct scale_sums sums[STREAMS];
    vm zero[STREAMS];
    for (int s = 0; s < STREAMS; s++) {
        vf amount;
        peak[s] = peak_of(x + 32 * s, 32, &amount);
        zero[s] = vf_lt(amount, vf_set(GROUP_MAX_EPS));
        inverse[s] = vf_div(vf_set(1), vf_div(vf_neg(peak[s]), vf_set(-127)));
    }
    add_iq4_sums(x, w, inverse, sums);
    for (int s = 0; s < STREAMS; s++) {
        vm some = vf_lt(vf_set(0), sums[s].l2);
        scale[s] = vf_select(some, vf_div(sums[s].lx, sums[s].l2), vf_set(0));
        best[s] = vf_mul(scale[s], sums[s].lx);
    }
    for (int is = -IQ4_TRIES; is <= IQ4_TRIES; is++) {
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++)
            inverse[s] = vf_div(vf_set((float)(is - 127)), peak[s]);
        add_iq4_sums(x, w, inverse, sums);
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            vf tried = vf_div(sums[s].lx, sums[s].l2);
            vm better = vf_lt(vf_mul(best[s], sums[s].l2), vf_mul(sums[s].lx, sums[s].lx));
            better = vm_and(better, vf_lt(vf_set(0), sums[s].l2));
            scale[s] = vf_select(better, tried, scale[s]);
            best[s] = vf_select(better, vf_mul(tried, sums[s].lx), best[s]);
        }
    }
    for (int s = 0; s < STREAMS; s++)
        scale[s] = vf_select(zero[s], vf_set(0), scale[s]);
}

INLINE void iq4_weights(const struct et_group *group, int first, int n, bool weighted, const vf *x, vf *w) {
    if (!weighted) {
        weigh_by_square(x, w, n);
        return;
    }
    load_w(group, first, n, w);
    weigh(x, w, n, vf_mul(sum_of_squares(x, n), vf_set(2.f / (float)n)));
}

INLINE uint64_t iq4_nl(const struct et_group *group, bool weighted) {
    vf x[STREAMS * 32], w[STREAMS * 32], scale[STREAMS];
    uint64_t not_proven = 0;
    for (int s = 0; s < STREAMS; s++) {
        load_x(group, s * LANES, 32, x + 32 * s);
        iq4_weights(group, s * LANES, 32, weighted, x + 32 * s, w + 32 * s);
        not_proven |= lanes_not(are_proven(x + 32 * s, 32)) << (s * LANES);
    }
    search_iq4(x, w, scale);
    for (int s = 0; s < STREAMS; s++) {
        vi levels[32], words[4];
        lane_floats d;
        vf inverse = inverse_of(scale[s]);
        for (int i = 0; i < 32; i++)
            levels[i] = vi_iq4_index(vf_mul(inverse, x[32 * s + i]));
        for (int i = 0; i < 4; i++)
            words[i] = nibbles_of(levels + 4 * i, 16);
        store_words(words, 4, group->out + s * LANES, 2);
        vf_store(d, scale[s]);
        for (int lane = 0; lane < LANES; lane++)
            put_f16(group->out[s * LANES + lane], d[lane]);
    }
    return not_proven;
}

/* Stores d and eight scales of 6 bits: the high two of each in 16 bits, the low four in 4 bytes. Returns in `inverse`
 * the factors for the levels, which are not rounded to f16. */
static inline void pack_iq4_xs_scales(const struct sub_floats *scales, int lane, uint8_t *out,
                                      struct sub_floats *inverse) {
    float d = -peak_scale(scales, 8, lane) / 32, id = d != 0 ? 1 / d : 0.f;
    uint32_t low = 0, high = 0;
    for (int j = 0; j < 8; j++) {
        int l = nearest_int(id * scales->of[j][lane]);
        l = l < -32 ? -32 : l > 31 ? 31 : l;
        float dl = d * (float)l;
        inverse->of[j][lane] = dl != 0 ? 1 / dl : 0.f;
        low |= (uint32_t)((l + 32) & 0xf) << 4 * j;
        high |= (uint32_t)((l + 32) >> 4) << 2 * j;
    }
    uint16_t high_bits = (uint16_t)high;
    put_f16(out, d);
    memcpy(out + 2, &high_bits, sizeof high_bits);
    memcpy(out + 4, &low, sizeof low);
}

INLINE uint64_t iq4_xs(const struct et_group *group, bool weighted) {
    vf x[SUPER], w[SUPER], scale[8];
    vi levels[SUPER], words[32];
    struct sub_floats scales, inverse;
    load_x(group, 0, SUPER, x);
    vm proven = are_proven(x, SUPER);
    iq4_weights(group, 0, SUPER, weighted, x, w);
    for (int j = 0; j < 8; j += STREAMS)
        search_iq4(x + 32 * j, w + 32 * j, scale + j);
    spread(scale, 8, &scales);
    for (int lane = 0; lane < LANES; lane++)
        pack_iq4_xs_scales(&scales, lane, group->out[lane], &inverse);
    for (int j = 0; j < 8; j++)
        for (int i = 32 * j; i < 32 * (j + 1); i++)
            levels[i] = vi_iq4_index(vf_mul(vf_load(inverse.of[j]), x[i]));
    for (int i = 0; i < 32; i++)
        words[i] = nibbles_of(levels + 32 * (i / 4) + 4 * (i % 4), 16);
    store_words(words, 32, group->out, IQ4_XS_LEVELS);
    return lanes_not(proven);
}

PLAIN_AND_WEIGHTED(iq4_nl)
PLAIN_AND_WEIGHTED(iq4_xs)

#endif
