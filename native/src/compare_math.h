/* exp and log in double from additions and multiplications only: those of libm differ in the last bit between
 * processors, and the results reach files. Also the two functions that keep small divergences free of cancellation.
 */
#ifndef EDGETUNE_COMPARE_MATH_H
#define EDGETUNE_COMPARE_MATH_H

#include <stdint.h>
#include <string.h>

/* Below this exponent a probability, relative to the largest of its row, counts as 0: exp(-708) is about the smallest
 * normal double. */
#define LOWEST_EXPONENT (-708.0)

/* exp(x) for |x| <= 708, relative error below 4e-16 (tested against libm): x = n ln2 + r with |r| <= 0.347, then
 * the Taylor polynomial of degree 13 (its remainder is below 5e-18), and 2^n as the exponent. */
static inline double exponential(double x) {
    const double shifter = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer, kept in the low bits */
    double shifted = x * 1.4426950408889634 + shifter;
    double n = shifted - shifter;
    double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* exp(x) for x <= 0 with -inf allowed; 0 below LOWEST_EXPONENT. */
static inline double mass(double x) {
    double e = exponential(x > LOWEST_EXPONENT ? x : LOWEST_EXPONENT);
    return x > LOWEST_EXPONENT ? e : 0.0;
}

/* log(x) for normal x > 0: x = 2^n m with m in [0.7, 1.4], and log m = 2 artanh s with s = (m - 1) / (m + 1), |s| below
 * 0.1765; the remainder after s^21 is below 1e-18. */
static inline double logarithm(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint64_t above = bits - 0x3fe6666666666666u; /* the bits of 0.7 */
    int64_t n = (int64_t)above >> 52;
    bits -= (uint64_t)n << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    double s = (m - 1.0) / (m + 1.0), s2 = s * s, series = 0.0;
    for (int k = 21; k >= 3; k -= 2)
        series = (series + 1.0 / k) * s2;
    double low = 2.0 * s * series + (double)n * 1.90821492927058770002e-10;
    return (double)n * 6.93147180369123816490e-01 + (2.0 * s + low);
}

/* exp(-x) - 1 + x, never negative; relative error below 1e-14 for |x| <= 1. */
static inline double exponential_residue(double x) {
    double sum = 0.0;
    for (int k = 20; k >= 3; k--)
        sum = (1.0 + sum) * -x / k;
    return 0.5 * x * x * (1.0 + sum);
}

/* x - log(1 + x) for x > -1, never negative. */
static inline double logarithm_residue(double x) {
    if (x > 0.125 || x < -0.125)
        return x - logarithm(1.0 + x);
    double sum = 0.0; /* x^2 (1/2 - x/3 + x^2/4 - ...): the remainder after 16 terms is 1e-15 of it */
    for (int k = 17; k >= 2; k--)
        sum = 1.0 / k - x * sum;
    return x * x * sum;
}

#endif
