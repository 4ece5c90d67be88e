/* The cells of vf_iq4_nearest: cell c in -15 .. 15 is the interval around 8.75 c, at index c modulo 32. In a cell
 * without a midpoint of two levels, "below" is its level. The tests compare them with the plain search. */
#ifndef EDGETUNE_IQ4_CELLS_H
#define EDGETUNE_IQ4_CELLS_H

static const float IQ4_CELL_MIDPOINT[32] = {
    INFINITY, 7,        19,       INFINITY, 31.5f,    45.5f,    INFINITY, 61,       INFINITY, 79,       INFINITY,
    INFINITY, 101,      INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, -115.5f,  INFINITY, -93.5f,
    INFINITY, INFINITY, -74,      -57,      INFINITY, -42,      INFINITY, -28.5f,   -16,      -4.5f,
};
static const float IQ4_CELL_BELOW[32] = {
    1, 1,    13,   25,   25,   38,   53,  53,  69,  69,  89,  89,  89,  113, 113, 113,
    0, -127, -127, -127, -104, -104, -83, -83, -83, -65, -49, -49, -35, -35, -22, -10,
};
static const float IQ4_CELL_ABOVE[32] = {
    1, 13,   25,   25,   38,   53,  53,  69,  69,  89,  89,  89,  113, 113, 113, 113,
    0, -127, -127, -104, -104, -83, -83, -83, -65, -49, -49, -35, -35, -22, -10, 1,
};
static const float IQ4_CELL_INDEX[32] = {
    /* of the level below */
    8, 8, 9, 10, 10, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 15, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6, 7,
};

#endif
