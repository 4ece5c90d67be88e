/* The sixteen levels of IQ4_NL and IQ4_XS (kvalues_iq4nl of the GGUF format) and the midpoints of neighboring levels.
 *
 * libggml finds the level nearest to x by x - lower < upper - x in f32. Both differences are exact where they are
 * nearly equal, so this is x < (lower + upper) / 2, and the midpoints are multiples of 1/2.
 */
#ifndef EDGETUNE_IQ4_LEVELS_H
#define EDGETUNE_IQ4_LEVELS_H

static const float IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const float IQ4_MIDPOINTS[15] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                        7,       19,     31.5f, 45.5f, 61,  79,     101};

#endif
