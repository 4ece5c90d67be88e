/* Q2_K to Q6_K: super-blocks of 256 weights, one per lane. Included by quantize_kernel.c.
 *
 * Each format has three steps: the search per sub-block, for LANES super-blocks at once; the scales of each
 * super-block, lane by lane in integers as in libggml; the levels for the scales as they will be read from the file.
 */
#ifndef EDGETUNE_QUANTIZE_K_H
#define EDGETUNE_QUANTIZE_K_H

/* --- formats with a scale and a minimum per sub-block
 * ------------------------------------------------------------------ */

/* The nearest level of x for scale d and minimum -m as they are stored; in sub-blocks with a stored scale of 0, the
 * level that the search found. */
INLINE void min_levels(const vf *x, int subs, int n, const struct sub_floats *d, const struct sub_floats *m,
                       const struct min_fit *fit, float top, vi *levels) {
    for (int j = 0; j < subs; j++) {
        vf scale = vf_load(d->of[j]), minimum = vf_load(m->of[j]);
        vm none = vf_eq(scale, vf_set(0));
        for (int i = j * n; i < (j + 1) * n; i++)
            levels[i] = clamp_int(round_any(vf_div(vf_add(x[i], minimum), scale)), 0, (int)top);
        if (vm_bits(none))
            for (int i = j * n; i < (j + 1) * n; i++)
                levels[i] = vi_select(none, level_of_min_fit(x[i], fit[j], top), levels[i]);
    }
}

INLINE vm search_all_mins(const vf *x, const vf *w, int subs, struct min_search how, struct min_fit *fit, vm proven) {
    for (int j = 0; j < subs; j += STREAMS)
        search_scale_and_min(x + j * how.n, w + j * how.n, how, fit + j);
    for (int j = 0; j < subs; j++)
        proven = vm_and(proven, fit[j].proven);
    return proven;
}

INLINE void scales_and_minima(const struct min_fit *fit, int subs, vf *scales, vf *minima) {
    for (int j = 0; j < subs; j++) {
        scales[j] = fit[j].scale;
        minima[j] = vf_neg(fit[j].minimum);
    }
}

static inline float largest(const struct sub_floats *values, int subs, int lane) {
    float max = 0;
    for (int j = 0; j < subs; j++)
        max = values->of[j][lane] > max ? values->of[j][lane] : max;
    return max;
}

/* Q4_K, Q5_K: eight pairs of 6 bits in 12 bytes. The arguments may have all 8 bits, as in libggml. */
static inline void pack_k4(const uint8_t *scale /* [8] */, const uint8_t *minimum /* [8] */, uint8_t *out /* [12] */) {
    for (int j = 0; j < 4; j++) {
        out[j] = scale[j];
        out[j + 4] = minimum[j];
    }
    for (int j = 4; j < 8; j++) {
        out[j + 4] = (uint8_t)((scale[j] & 0xf) | (minimum[j] & 0xf) << 4);
        out[j - 4] |= (uint8_t)(scale[j] >> 4 << 6);
        out[j] |= (uint8_t)(minimum[j] >> 4 << 6);
    }
}

/* Scale and minimum of each sub-block, as a reader of a Q4_K or Q5_K block computes them. */
static inline void read_k4(const uint8_t *block, int lane, struct sub_floats *d, struct sub_floats *m) {
    const uint8_t *q = block + 4;
    float scale = get_f16(block), minimum = get_f16(block + 2);
    for (int j = 0; j < 8; j++) {
        int s = j < 4 ? q[j] & 63 : (q[j + 4] & 0xf) | (q[j - 4] >> 6 << 4);
        int l = j < 4 ? q[j + 4] & 63 : (q[j + 4] >> 4) | (q[j] >> 6 << 4);
        d->of[j][lane] = scale * (float)s;
        m->of[j][lane] = minimum * (float)l;
    }
}

INLINE void k4_scales_plain(const struct min_fit *fit, uint8_t *const *out) {
    vf scales[8], minima[8];
    struct sub_floats s, m;
    scales_and_minima(fit, 8, scales, minima);
    spread(scales, 8, &s);
    spread(minima, 8, &m);
    for (int lane = 0; lane < LANES; lane++) {
        float max_scale = largest(&s, 8, lane), max_min = largest(&m, 8, lane);
        float inverse_scale = max_scale > 0 ? 63.f / max_scale : 0.f, inverse_min = max_min > 0 ? 63.f / max_min : 0.f;
        uint8_t ls[8], lm[8];
        for (int j = 0; j < 8; j++) {
            ls[j] = (uint8_t)nearest_int(inverse_scale * s.of[j][lane]);
            lm[j] = (uint8_t)nearest_int(inverse_min * m.of[j][lane]);
            ls[j] = ls[j] < 63 ? ls[j] : 63;
            lm[j] = lm[j] < 63 ? lm[j] : 63;
        }
        put_f16(out[lane], max_scale / 63.f);
        put_f16(out[lane] + 2, max_min / 63.f);
        pack_k4(ls, lm, out[lane] + 4);
    }
}

INLINE void k4_scales_weighted(const struct min_fit *fit, const vf *sum_w, int limit, uint8_t *const *out) {
    vf scales[8], minima[8];
    vi levels[8];
    struct lane_ints s, m;
    lane_floats d, dmin;
    scales_and_minima(fit, 8, scales, minima);
    vf_store(d, search_positive_scale(scales, sum_w, 8, 63, levels));
    spread_ints(levels, 8, &s);
    vf_store(dmin, search_positive_scale(minima, sum_w, 8, 63, levels));
    spread_ints(levels, 8, &m);
    for (int lane = 0; lane < LANES; lane++) {
        uint8_t ls[8], lm[8];
        for (int j = 0; j < 8; j++) {
            ls[j] = (uint8_t)(s.of[j][lane] < limit ? s.of[j][lane] : limit);
            lm[j] = (uint8_t)(m.of[j][lane] < limit ? m.of[j][lane] : limit);
        }
        put_f16(out[lane], d[lane]);
        put_f16(out[lane] + 2, dmin[lane]);
        pack_k4(ls, lm, out[lane] + 4);
    }
}

/* The search and the scales of Q4_K and Q5_K, and the levels for them. */
INLINE vm k4_levels(const struct et_group *group, bool weighted, struct min_search how, int limit, vi *levels) {
    vf x[SUPER], w[SUPER], sum_w[8];
    struct min_fit fit[8];
    struct sub_floats d, m;
    load_x(group, 0, SUPER, x);
    vm proven = are_proven(x, SUPER);
    if (weighted) {
        load_w(group, 0, SUPER, w);
        vf sigma2 = vf_div(vf_mul(vf_set(2), sum_of_squares(x, SUPER)), vf_set(SUPER));
        weigh(x, w, SUPER, sigma2);
        for (int j = 0; j < 8; j++)
            sum_w[j] = sum_of(w + 32 * j, 32);
    } else {
        for (int j = 0; j < 8; j++) {
            vf average = vf_sqrt(vf_div(sum_of_squares(x + 32 * j, 32), vf_set(32)));
            for (int i = 32 * j; i < 32 * (j + 1); i++)
                w[i] = vf_add(average, vf_abs(x[i]));
        }
    }
    proven = search_all_mins(x, w, 8, how, fit, proven);
    if (weighted)
        k4_scales_weighted(fit, sum_w, limit, group->out);
    else
        k4_scales_plain(fit, group->out);
    for (int lane = 0; lane < LANES; lane++)
        read_k4(group->out[lane], lane, &d, &m);
    min_levels(x, 8, 32, &d, &m, fit, how.top, levels);
    return proven;
}

/* Four bits of each level: 32 bytes for every 64 of them. */
INLINE void pack_nibbles(const vi *levels, vi *words /* [32] */) {
    for (int j = 0; j < SUPER; j += 64)
        for (int i = 0; i < 32; i += 4)
            words[j / 8 + i / 4] = nibbles_of(levels + j + i, 32);
}

static const struct min_search q4_k_search = {32, 15, -1.f, 0.1f, 20, false};
static const struct min_search q5_k_search = {32, 31, -0.5f, 0.1f, 15, false};

INLINE uint64_t q4_k(const struct et_group *group, bool weighted) {
    vi levels[SUPER], words[32];
    struct min_search how = weighted ? (struct min_search){32, 15, -0.9f, 0.05f, 36, false} : q4_k_search;
    vm proven = k4_levels(group, weighted, how, 255, levels);
    pack_nibbles(levels, words);
    store_words(words, 32, group->out, 16);
    return lanes_not(proven);
}

INLINE uint64_t q5_k(const struct et_group *group, bool weighted) {
    vi levels[SUPER], words[40];
    struct min_search how = weighted ? (struct min_search){32, 31, -0.9f, 0.05f, 36, false} : q5_k_search;
    vm proven = k4_levels(group, weighted, how, 63, levels);
    for (int i = 0; i < 32; i += 4) { /* bit j of byte i: the fifth bit of level i of the j-th 32 */
        vi byte[4];
        for (int b = 0; b < 4; b++) {
            byte[b] = vi_set(0);
            for (int j = 0; j < 8; j++)
                byte[b] = vi_or(byte[b], vi_shl(vi_shr(levels[32 * j + i + b], 4), j));
        }
        words[i / 4] = word_of(byte[0], byte[1], byte[2], byte[3]);
    }
    pack_nibbles(levels, words + 8);
    store_words(words, 40, group->out, 16);
    return lanes_not(proven);
}

/* --- Q2_K
 * -------------------------------------------------------------------------------------------------------------- */

enum { Q2_K_SCALES = 0, Q2_K_LEVELS = 16, Q2_K_D = 80, Q2_K_MIN = 82 };

static inline void read_q2_k(const uint8_t *block, int lane, struct sub_floats *d, struct sub_floats *m) {
    float scale = get_f16(block + Q2_K_D), minimum = get_f16(block + Q2_K_MIN);
    for (int j = 0; j < 16; j++) {
        d->of[j][lane] = scale * (float)(block[j] & 0xf);
        m->of[j][lane] = minimum * (float)(block[j] >> 4);
    }
}

INLINE void q2_k_scales_plain(const struct min_fit *fit, uint8_t *const *out) {
    vf scales[16], minima[16];
    struct sub_floats s, m;
    scales_and_minima(fit, 16, scales, minima);
    spread(scales, 16, &s);
    spread(minima, 16, &m);
    for (int lane = 0; lane < LANES; lane++) {
        float max_scale = largest(&s, 16, lane), max_min = largest(&m, 16, lane);
        float inverse_scale = 15.f / max_scale, inverse_min = 15.f / max_min;
        for (int j = 0; j < 16; j++) {
            unsigned scale = max_scale > 0 ? (unsigned)nearest_int(inverse_scale * s.of[j][lane]) : 0;
            unsigned minimum = max_min > 0 ? (unsigned)nearest_int(inverse_min * m.of[j][lane]) : 0;
            out[lane][j] = (uint8_t)(scale | minimum << 4);
        }
        put_f16(out[lane] + Q2_K_D, max_scale > 0 ? max_scale / 15.f : 0.f);
        put_f16(out[lane] + Q2_K_MIN, max_min > 0 ? max_min / 15.f : 0.f);
    }
}

INLINE void q2_k_scales_weighted(const struct min_fit *fit, const vf *sum_w, uint8_t *const *out) {
    vf scales[16], minima[16];
    vi levels[16];
    struct lane_ints s, m;
    lane_floats d, dmin;
    scales_and_minima(fit, 16, scales, minima);
    vf_store(d, search_positive_scale(scales, sum_w, 16, 15, levels));
    spread_ints(levels, 16, &s);
    vf_store(dmin, search_positive_scale(minima, sum_w, 16, 15, levels));
    spread_ints(levels, 16, &m);
    for (int lane = 0; lane < LANES; lane++) {
        for (int j = 0; j < 16; j++)
            out[lane][j] = (uint8_t)(s.of[j][lane] | m.of[j][lane] << 4);
        put_f16(out[lane] + Q2_K_D, d[lane]);
        put_f16(out[lane] + Q2_K_MIN, dmin[lane]);
    }
}

/* Two bits of each level: byte i of a half holds levels i, i + 32, i + 64, i + 96 of its 128. */
INLINE void pack_pairs(const vi *levels, vi *words /* [16] */) {
    const vi low = vi_set(3);
    for (int j = 0; j < SUPER; j += 128)
        for (int i = 0; i < 32; i += 4) {
            vi byte[4];
            for (int b = 0; b < 4; b++) {
                const vi *l = levels + j + i + b;
                byte[b] = vi_or(vi_or(vi_and(l[0], low), vi_shl(vi_and(l[32], low), 2)),
                                vi_or(vi_shl(vi_and(l[64], low), 4), vi_shl(vi_and(l[96], low), 6)));
            }
            words[j / 16 + i / 4] = word_of(byte[0], byte[1], byte[2], byte[3]);
        }
}

INLINE uint64_t q2_k(const struct et_group *group, bool weighted) {
    vf x[SUPER], w[SUPER], sum_w[16];
    vi levels[SUPER], words[16];
    struct min_fit fit[16];
    struct sub_floats d, m;
    struct min_search how = weighted ? (struct min_search){16, 3, -0.9f, 0.05f, 36, false}
                                     : (struct min_search){16, 3, -0.5f, 0.1f, 15, true};
    load_x(group, 0, SUPER, x);
    vm proven = are_proven(x, SUPER);
    if (weighted) {
        load_w(group, 0, SUPER, w);
        weigh(x, w, SUPER, vf_div(sum_of_squares(x, SUPER), vf_set(SUPER)));
        for (int j = 0; j < 16; j++)
            sum_w[j] = sum_of(w + 16 * j, 16);
    } else {
        for (int i = 0; i < SUPER; i++)
            w[i] = vf_abs(x[i]);
    }
    proven = search_all_mins(x, w, 16, how, fit, proven);
    if (weighted)
        q2_k_scales_weighted(fit, sum_w, group->out);
    else
        q2_k_scales_plain(fit, group->out);
    for (int lane = 0; lane < LANES; lane++)
        read_q2_k(group->out[lane], lane, &d, &m);
    min_levels(x, 16, 16, &d, &m, fit, 3, levels);
    pack_pairs(levels, words);
    store_words(words, 16, group->out, Q2_K_LEVELS);
    return lanes_not(proven);
}

/* --- formats with a signed scale per sub-block
 * ------------------------------------------------------------------------- */

INLINE void scale_levels(const vf *x, const struct sub_floats *d, float half, const vi *found, vi *levels) {
    for (int j = 0; j < 16; j++) {
        vf scale = vf_load(d->of[j]);
        vm none = vf_eq(scale, vf_set(0));
        for (int i = 16 * j; i < 16 * (j + 1); i++) {
            vi level = clamp_int(round_any(vf_div(x[i], scale)), -(int)half, (int)half - 1);
            levels[i] = vi_select(none, found[i], vi_add(level, vi_set((int)half)));
        }
    }
}

INLINE void search_all_scales(const vf *x, const vf *w, float half, struct scale_fit *fit /* [16] */) {
    for (int j = 0; j < 16; j += STREAMS)
        search_scale(x + 16 * j, w + 16 * j, 16, half, STREAMS, fit + j);
}

INLINE void found_levels(const vf *x, const struct scale_fit *fit, float half, vi *found) {
    for (int i = 0; i < SUPER; i++)
        found[i] = level_of_scale_fit(x[i], fit[i / 16], half);
}

/* --- Q3_K
 * -------------------------------------------------------------------------------------------------------------- */

enum { Q3_K_HIGH = 0, Q3_K_LEVELS = 32, Q3_K_SCALES = 96, Q3_K_D = 108 };

/* Sixteen scales of 6 bits: four low bits in bytes 0 .. 7, two high bits in bytes 8 .. 11. */
static inline void pack_q3_scales(const int *scale /* [16], 0 .. 63 */, uint8_t *out /* [12] */) {
    memset(out, 0, 12);
    for (int j = 0; j < 16; j++) {
        out[j % 8] |= (uint8_t)((scale[j] & 0xf) << 4 * (j / 8));
        out[j % 4 + 8] |= (uint8_t)(scale[j] >> 4 << 2 * (j / 4));
    }
}

static inline void read_q3_k(const uint8_t *block, int lane, struct sub_floats *d) {
    const uint8_t *q = block + Q3_K_SCALES;
    float scale = get_f16(block + Q3_K_D);
    for (int j = 0; j < 16; j++) {
        int low = j < 8 ? q[j] & 0xf : q[j - 8] >> 4, high = q[8 + j % 4] >> 2 * (j / 4) & 3;
        d->of[j][lane] = scale * (float)((low | high << 4) - 32);
    }
}

INLINE void q3_k_scales_plain(const vf *scales, uint8_t *const *out) {
    struct sub_floats s;
    spread(scales, 16, &s);
    for (int lane = 0; lane < LANES; lane++) {
        float peak = peak_scale(&s, 16, lane), inverse = -32.f / peak;
        int packed[16] = {0};
        for (int j = 0; peak != 0 && j < 16; j++) {
            int l = (int8_t)nearest_int(inverse * s.of[j][lane]);
            packed[j] = (l < -32 ? -32 : l > 31 ? 31 : l) + 32;
        }
        pack_q3_scales(packed, out[lane] + Q3_K_SCALES);
        put_f16(out[lane] + Q3_K_D, peak != 0 ? 1 / inverse : 0.f);
    }
}

INLINE void q3_k_scales_weighted(const vf *scales, const vf *sum_w, uint8_t *const *out) {
    struct scale_fit fit;
    struct lane_ints l;
    lane_floats d;
    vi levels[16];
    search_scale(scales, sum_w, 16, 32, 1, &fit);
    for (int j = 0; j < 16; j++)
        levels[j] = level_of_scale_fit(scales[j], fit, 32);
    spread_ints(levels, 16, &l);
    vf_store(d, fit.scale);
    for (int lane = 0; lane < LANES; lane++) {
        int packed[16];
        for (int j = 0; j < 16; j++)
            packed[j] = l.of[j][lane];
        pack_q3_scales(packed, out[lane] + Q3_K_SCALES);
        put_f16(out[lane] + Q3_K_D, d[lane]);
    }
}

/* Bit j of byte i: the third bit of level i of the j-th 32. */
INLINE void pack_third_bits(const vi *levels, vi *words /* [8] */) {
    for (int i = 0; i < 32; i += 4) {
        vi byte[4];
        for (int b = 0; b < 4; b++) {
            byte[b] = vi_set(0);
            for (int j = 0; j < 8; j++)
                byte[b] = vi_or(byte[b], vi_shl(vi_shr(levels[32 * j + i + b], 2), j));
        }
        words[i / 4] = word_of(byte[0], byte[1], byte[2], byte[3]);
    }
}

INLINE uint64_t q3_k(const struct et_group *group, bool weighted) {
    vf x[SUPER], scales[16];
    vi found[SUPER], levels[SUPER], words[24];
    struct sub_floats d;
    load_x(group, 0, SUPER, x);
    vm proven = are_proven(x, SUPER);
    if (weighted) {
        vf w[SUPER], sum_w[16];
        struct scale_fit fit[16];
        load_w(group, 0, SUPER, w);
        weigh(x, w, SUPER, vf_div(vf_mul(vf_set(2), sum_of_squares(x, SUPER)), vf_set(SUPER)));
        for (int j = 0; j < 16; j++)
            sum_w[j] = sum_of(w + 16 * j, 16);
        search_all_scales(x, w, 4, fit);
        found_levels(x, fit, 4, found);
        for (int j = 0; j < 16; j++) { /* sums of huge weights overflow, and the search below must not see a NaN */
            scales[j] = fit[j].scale;
            proven = vm_and(proven, vf_le(vf_abs(scales[j]), vf_set(PROVEN_MAX)));
        }
        q3_k_scales_weighted(scales, sum_w, group->out);
    } else {
        for (int j = 0; j < 16; j += LEVEL_STREAMS)
            search_scale_by_level(x + 16 * j, 16, 4, scales + j, found + 16 * j);
        q3_k_scales_plain(scales, group->out);
    }
    for (int lane = 0; lane < LANES; lane++)
        read_q3_k(group->out[lane], lane, &d);
    scale_levels(x, &d, 4, found, levels);
    pack_third_bits(levels, words);
    pack_pairs(levels, words + 8);
    store_words(words, 24, group->out, Q3_K_HIGH);
    return lanes_not(proven);
}

/* --- Q6_K
 * -------------------------------------------------------------------------------------------------------------- */

enum { Q6_K_LOW = 0, Q6_K_SCALES = 192, Q6_K_D = 208, Q6_K_BYTES = 210 };

INLINE void q6_k_scales(const struct scale_fit *fit, uint8_t *const *out, struct sub_floats *d) {
    vf scales[16];
    struct sub_floats s;
    for (int j = 0; j < 16; j++)
        scales[j] = fit[j].scale;
    spread(scales, 16, &s);
    for (int lane = 0; lane < LANES; lane++) {
        float inverse = -128.f / peak_scale(&s, 16, lane);
        put_f16(out[lane] + Q6_K_D, 1 / inverse);
        float scale = get_f16(out[lane] + Q6_K_D);
        for (int j = 0; j < 16; j++) {
            int l = nearest_int(inverse * s.of[j][lane]);
            int8_t stored = (int8_t)(l < 127 ? l : 127);
            out[lane][Q6_K_SCALES + j] = (uint8_t)stored;
            d->of[j][lane] = scale * (float)stored;
        }
    }
}

/* Four low bits of each level in 128 bytes, two high bits in 64. */
INLINE void pack_q6_levels(const vi *levels, vi *words /* [48] */) {
    const vi low = vi_set(0xf);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 32; i += 4) {
            vi first[4], second[4], high[4];
            for (int b = 0; b < 4; b++) {
                const vi *l = levels + 128 * h + i + b;
                first[b] = vi_or(vi_and(l[0], low), vi_shl(vi_and(l[64], low), 4));
                second[b] = vi_or(vi_and(l[32], low), vi_shl(vi_and(l[96], low), 4));
                high[b] = vi_or(vi_or(vi_shr(l[0], 4), vi_shl(vi_shr(l[32], 4), 2)),
                                vi_or(vi_shl(vi_shr(l[64], 4), 4), vi_shl(vi_shr(l[96], 4), 6)));
            }
            words[16 * h + i / 4] = word_of(first[0], first[1], first[2], first[3]);
            words[16 * h + 8 + i / 4] = word_of(second[0], second[1], second[2], second[3]);
            words[32 + 8 * h + i / 4] = word_of(high[0], high[1], high[2], high[3]);
        }
}

INLINE uint64_t q6_k(const struct et_group *group, bool weighted) {
    vf x[SUPER], w[SUPER];
    vi found[SUPER], levels[SUPER], words[48];
    struct scale_fit fit[16];
    struct sub_floats d;
    load_x(group, 0, SUPER, x);
    vm proven = are_proven(x, SUPER);
    if (weighted)
        load_w(group, 0, SUPER, w);
    else
        weigh_by_square(x, w, SUPER);
    search_all_scales(x, w, 32, fit);
    found_levels(x, fit, 32, found);
    q6_k_scales(fit, group->out, &d);
    scale_levels(x, &d, 32, found, levels);
    pack_q6_levels(levels, words);
    store_words(words, 48, group->out, Q6_K_LOW);

    vf largest_scale = vf_set(0);
    for (int j = 0; j < 16; j++)
        largest_scale = vf_max(vf_abs(fit[j].scale), largest_scale);
    uint32_t empty = vm_bits(vf_lt(largest_scale, vf_set(GROUP_MAX_EPS)));
    for (int lane = 0; lane < LANES; lane++)
        if (empty >> lane & 1)
            memset(group->out[lane], 0, Q6_K_BYTES);
    return lanes_not(proven);
}

/* --- the functions of the table
 * ---------------------------------------------------------------------------------------- */

PLAIN_AND_WEIGHTED(q2_k)
PLAIN_AND_WEIGHTED(q3_k)
PLAIN_AND_WEIGHTED(q4_k)
PLAIN_AND_WEIGHTED(q5_k)
PLAIN_AND_WEIGHTED(q6_k)

#endif
