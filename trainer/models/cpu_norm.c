/* BatchNorm, addition and ReLU in one pass on a CPU, forward and backward: see cpu_norm.py, which compiles this file.

A tensor is a matrix of `rows` x `channels`, row by row: (N, C, H, W) in channels-last memory. What is summed over the
rows is summed slab by slab, and the slabs then in their order, so that the result does not depend on the number of
threads. A slab fits into a core's own cache: what is read of it twice comes from memory once.

The file includes itself once for each type of tensor. Arithmetic is float whatever the type. */

#ifndef VALUE

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t size;

/* No two of the arrays overlap: compilers give up checking where there are many. */
#if defined(__clang__)
#define APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define APART _Pragma("GCC ivdep")
#endif

#define VALUE float
#define NAME(name) name##_float
#define LOAD(value) (value)
#define STORE(value) (value)
#include "cpu_norm.c"
#undef VALUE
#undef NAME
#undef LOAD
#undef STORE

static inline float widened(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To nearest, ties to even; NaN stays NaN. */
static inline uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

#define VALUE uint16_t
#define NAME(name) name##_bfloat16
#define LOAD(value) widened(value)
#define STORE(value) narrowed(value)
#include "cpu_norm.c"

#else

/* Rows of a slab and their number: SLAB_VALUES values, at least a row. */
#ifndef SLAB_VALUES
#define SLAB_VALUES 65536
static size slab_rows(size channels) {
    return channels < SLAB_VALUES ? SLAB_VALUES / channels : 1;
}
size slabs(size rows, size channels) {
    return (rows + slab_rows(channels) - 1) / slab_rows(channels);
}
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#endif

/* mean[c], and variance[c] without Bessel's correction. scratch: 2 x slabs x channels. */
void NAME(moments)(const VALUE *restrict x, float *restrict mean, float *restrict variance, float *restrict scratch,
                   size rows, size channels, int threads) {
    const size each = slab_rows(channels), count = slabs(rows, channels);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size slab = 0; slab < count; slab++) {
        const size first = slab * each, last = MIN(first + each, rows);
        float *restrict sum = scratch + 2 * slab * channels, *restrict squares = sum + channels;
        memset(sum, 0, 2 * channels * sizeof(float));
        size row = first;
        for (; row + 4 <= last; row += 4) {
            const VALUE *restrict at = x + row * channels;
            APART for (size c = 0; c < channels; c++)
                sum[c] += (LOAD(at[c]) + LOAD(at[c + channels])) + (LOAD(at[c + 2 * channels]) + LOAD(at[c + 3 * channels]));
        }
        for (; row < last; row++)
            APART for (size c = 0; c < channels; c++)
                sum[c] += LOAD(x[row * channels + c]);
        APART for (size c = 0; c < channels; c++)
            sum[c] /= (float)(last - first);
        /* About the slab's own mean: a mean far from 0 costs no digits. */
        row = first;
        for (; row + 2 <= last; row += 2) {
            const VALUE *restrict at = x + row * channels;
            APART for (size c = 0; c < channels; c++) {
                const float one = LOAD(at[c]) - sum[c], two = LOAD(at[c + channels]) - sum[c];
                squares[c] += one * one + two * two;
            }
        }
        for (; row < last; row++)
            APART for (size c = 0; c < channels; c++) {
                const float one = LOAD(x[row * channels + c]) - sum[c];
                squares[c] += one * one;
            }
    }
    /* Slab by slab as Chan, Golub and LeVeque (1979) add two: the means of slabs differ. */
    memcpy(mean, scratch, channels * sizeof(float));
    memcpy(variance, scratch + channels, channels * sizeof(float));
    for (size slab = 1; slab < count; slab++) {
        const float before = (float)(slab * each), here = (float)(MIN((slab + 1) * each, rows) - slab * each);
        const float *restrict sum = scratch + 2 * slab * channels, *restrict squares = sum + channels;
        APART for (size c = 0; c < channels; c++) {
            const float step = sum[c] - mean[c];
            mean[c] += step * (here / (before + here));
            variance[c] += squares[c] + step * step * (before * here / (before + here));
        }
    }
    APART for (size c = 0; c < channels; c++)
        variance[c] /= (float)rows;
}

/* y = x * scale + shift (+ shortcut), and of that the part above 0 if `relu`. `shortcut` may be NULL. */
void NAME(normalise)(const VALUE *restrict x, const VALUE *restrict shortcut, VALUE *restrict y,
                     const float *restrict scale, const float *restrict shift, size rows, size channels, int relu,
                     int threads) {
    /* NaN stays NaN: it is not below the floor. */
    const float floor = relu ? 0.0f : -INFINITY;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size row = 0; row < rows; row++) {
        const VALUE *restrict in = x + row * channels;
        VALUE *restrict out = y + row * channels;
        if (shortcut) {
            const VALUE *restrict more = shortcut + row * channels;
            APART for (size c = 0; c < channels; c++) {
                const float value = LOAD(in[c]) * scale[c] + shift[c] + LOAD(more[c]);
                out[c] = STORE(value < floor ? floor : value);
            }
        } else
            APART for (size c = 0; c < channels; c++) {
                const float value = LOAD(in[c]) * scale[c] + shift[c];
                out[c] = STORE(value < floor ? floor : value);
            }
    }
}

/* sums[0][c] = sum of dz, sums[1][c] = sum of dz * (x - mean). dz is dy, but 0 where the ReLU let nothing through: where
y is not above 0, or without y where x * scale + shift is not, or nowhere if scale is NULL too. With y, dz itself goes to
`passed`. scratch: 2 x slabs x channels. */
void NAME(gradient_sums)(const VALUE *restrict dy, const VALUE *restrict x, const VALUE *restrict y,
                         const float *restrict scale, const float *restrict shift, const float *restrict mean,
                         VALUE *restrict passed, float *restrict sums, float *restrict scratch, size rows,
                         size channels, int threads) {
    const size each = slab_rows(channels), count = slabs(rows, channels);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size slab = 0; slab < count; slab++) {
        const size first = slab * each, last = MIN(first + each, rows);
        float *restrict sum = scratch + 2 * slab * channels, *restrict products = sum + channels;
        memset(sum, 0, 2 * channels * sizeof(float));
        for (size row = first; row < last; row++) {
            const VALUE *restrict at = x + row * channels, *restrict coming = dy + row * channels;
            if (y) {
                const VALUE *restrict gate = y + row * channels;
                VALUE *restrict out = passed + row * channels;
                APART for (size c = 0; c < channels; c++) {
                    const float dz = LOAD(gate[c]) <= 0.0f ? 0.0f : LOAD(coming[c]);
                    out[c] = STORE(dz);
                    sum[c] += dz;
                    products[c] += dz * (LOAD(at[c]) - mean[c]);
                }
            } else if (scale)
                APART for (size c = 0; c < channels; c++) {
                    const float value = LOAD(at[c]);
                    const float dz = value * scale[c] + shift[c] <= 0.0f ? 0.0f : LOAD(coming[c]);
                    sum[c] += dz;
                    products[c] += dz * (value - mean[c]);
                }
            else
                APART for (size c = 0; c < channels; c++) {
                    const float dz = LOAD(coming[c]);
                    sum[c] += dz;
                    products[c] += dz * (LOAD(at[c]) - mean[c]);
                }
        }
    }
    memset(sums, 0, 2 * channels * sizeof(float));
    for (size slab = 0; slab < count; slab++)
        for (size c = 0; c < 2 * channels; c++)
            sums[c] += scratch[2 * slab * channels + c];
}

/* dx = dz * a + x * b + d. dz is dy, but 0 where x * scale + shift is not above 0 unless scale is NULL. */
void NAME(gradient)(const VALUE *restrict dy, const VALUE *restrict x, const float *restrict scale,
                    const float *restrict shift, VALUE *restrict dx, const float *restrict a, const float *restrict b,
                    const float *restrict d, size rows, size channels, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size row = 0; row < rows; row++) {
        const VALUE *restrict at = x + row * channels, *restrict coming = dy + row * channels;
        VALUE *restrict out = dx + row * channels;
        if (scale)
            APART for (size c = 0; c < channels; c++) {
                const float value = LOAD(at[c]);
                const float dz = value * scale[c] + shift[c] <= 0.0f ? 0.0f : LOAD(coming[c]);
                out[c] = STORE(dz * a[c] + value * b[c] + d[c]);
            }
        else
            APART for (size c = 0; c < channels; c++)
                out[c] = STORE(LOAD(coming[c]) * a[c] + LOAD(at[c]) * b[c] + d[c]);
    }
}

#endif
