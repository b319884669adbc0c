/* Row operations of a decoder for the CPU, in C99 with the vector types of GCC and Clang.
 *
 * A row's bits depend on that row alone. Every output of the product has one vector accumulator,
 * which takes its terms in ascending order and is reduced by one tree, whatever the number of rows,
 * the row's place, the blocking and the number of threads. Contraction is off and the one fused
 * operation is written out (`fused`), so no compiler gives the variants of the inner loop different
 * roundings. Must be compiled without -ffast-math.
 *
 * Shapes are as in functional.py, row-major and contiguous. Work is shared among `threads` threads
 * of the OpenMP runtime that the process already has.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* LANES floats a vector; TILE_ROWS input rows a tile, so that the accumulators stay in registers. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 4
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define TILE_ROWS 2
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define LANES 4
#define TILE_ROWS 4
#else
#define LANES 4
#define TILE_ROWS 2
#endif

enum {
    TILE_OUTPUTS = 4,
    PANEL = 16,       /* weight rows that stay in cache while every input row meets them */
    SERIAL = 1 << 15  /* elements below which waking other threads costs more than it saves */
};

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float quad __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The first `count` lanes, zeros in the others. */
INLINE vec load_part(const float *p, long count)
{
    vec v = {0};
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}

/* a * b + c: in one rounding where the processor can, in two everywhere where it cannot. */
INLINE vec fused(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Halves are added until four lanes are left, then pairs. */
INLINE float sum(vec v)
{
    quad part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int width = LANES / 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

/* sums[m][n] = x[m] . w[n] for `rows` input rows and `outputs` weight rows; rows that lie `ahead`
 * weight rows further on are fetched meanwhile. */
INLINE void tile(const float *x, const float *w, long K, int rows, int outputs, int ahead,
                 float (*sums)[TILE_OUTPUTS])
{
    vec total[TILE_ROWS][TILE_OUTPUTS];
    long k = 0;

    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++)
            total[m][n] = (vec){0};
    for (; k + LANES <= K; k += LANES) {
        vec b[TILE_OUTPUTS];
        for (int n = 0; n < outputs; n++) {
            b[n] = load(w + n * K + k);
            if (ahead)
                __builtin_prefetch(w + (n + ahead) * K + k, 0, 2);
        }
        for (int m = 0; m < rows; m++) {
            vec a = load(x + m * K + k);
            for (int n = 0; n < outputs; n++)
                total[m][n] = fused(a, b[n], total[m][n]);
        }
    }
    if (k < K)
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < outputs; n++)
                total[m][n] = fused(load_part(x + m * K + k, K - k),
                                    load_part(w + n * K + k, K - k), total[m][n]);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++)
            sums[m][n] = sum(total[m][n]);
}

/* The tile of any size up to the full one: the compiler unrolls each case by itself. */
INLINE void any_tile(const float *x, const float *w, long K, int rows, int outputs, int ahead,
                     float (*sums)[TILE_OUTPUTS])
{
    if (outputs < TILE_OUTPUTS) {
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < outputs; n++) {
                float one[1][TILE_OUTPUTS];
                tile(x + m * K, w + n * K, K, 1, 1, 0, one);
                sums[m][n] = one[0][0];
            }
        return;
    }
    switch (rows) {
    case 1:
        tile(x, w, K, 1, TILE_OUTPUTS, TILE_OUTPUTS, sums);
        break;
    case 2:
        tile(x, w, K, 2, TILE_OUTPUTS, TILE_OUTPUTS, sums);
        break;
#if TILE_ROWS > 2
    case 3:
        tile(x, w, K, 3, TILE_OUTPUTS, TILE_OUTPUTS, sums);
        break;
    default:
        if (ahead)
            tile(x, w, K, TILE_ROWS, TILE_OUTPUTS, PANEL, sums);
        else
            tile(x, w, K, TILE_ROWS, TILE_OUTPUTS, 0, sums);
#endif
    }
}

/* Outputs from .. to - 1 of every input row. */
static void panel(const float *x, const float *w, const float *bias, const float *residual,
                  float *out, long M, long N, long K, long from, long to)
{
    for (long m = 0; m < M; m += TILE_ROWS) {
        int rows = M - m < TILE_ROWS ? (int)(M - m) : TILE_ROWS;
        for (long n = from; n < to; n += TILE_OUTPUTS) {
            int outputs = to - n < TILE_OUTPUTS ? (int)(to - n) : TILE_OUTPUTS;
            float sums[TILE_ROWS][TILE_OUTPUTS];
            any_tile(x + m * K, w + n * K, K, rows, outputs, m == 0, sums);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < outputs; i++) {
                    long at = (m + r) * N + n + i;
                    float y = sums[r][i];
                    if (bias)
                        y += bias[n + i];
                    if (residual)
                        y += residual[at];
                    out[at] = y;
                }
        }
    }
}

/* out[m, n] = sum over k of x[m, k] * w[n, k] (+ bias[n]) (+ residual[m, n]) */
void speckv_linear_f32(const float *x, const float *w, const float *bias, const float *residual,
                       float *out, long M, long N, long K, int threads)
{
    long panels = (N + PANEL - 1) / PANEL;

#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < panels; p++) {
        long from = p * PANEL, to = from + PANEL < N ? from + PANEL : N;
        panel(x, w, bias, residual, out, M, N, K, from, to);
    }
}

/* Elements are fp32, or bf16 (`half`, a constant wherever these are inlined); all arithmetic is fp32
 * and what is stored is rounded to nearest, ties to even. */

INLINE float widen(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE uint16_t narrow(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : 0x7fc00000u;
    return (uint16_t)(bits >> 16);
}

INLINE float get(const void *p, long i, int half)
{
    return half ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void put(void *p, long i, float x, int half)
{
    if (half)
        ((uint16_t *)p)[i] = narrow(x);
    else
        ((float *)p)[i] = x;
}

INLINE float rounded(float x, int half)
{
    return half ? widen(narrow(x)) : x;
}

/* Bytes of one element, for the address of a row. */
INLINE long size(int half)
{
    return half ? 2 : 4;
}

/* e**x to about two units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor
 * polynomial of degree 7 in r, and 2**n made of bits. Beyond +-87 it stays at its value there. */
INLINE float exponential(float x)
{
    const float shift = 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
    float bounded = x > 87.0f ? 87.0f : x;
    bounded = bounded < -87.0f ? -87.0f : bounded;
    float shifted = bounded * 1.44269504f + shift;
    float n = shifted - shift;
    float r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f; /* ln 2 in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

INLINE void norm_row(const void *restrict x, const void *restrict weight, void *restrict out,
                     long K, float eps, int half)
{
    vec total = {0};
    for (long k = 0; k < K; k += LANES) {
        float part[LANES] = {0};
        long count = K - k < LANES ? K - k : LANES;
        if (count == LANES)
            for (int i = 0; i < LANES; i++)
                part[i] = get(x, k + i, half);
        else
            for (long i = 0; i < count; i++)
                part[i] = get(x, k + i, half);
        vec v = load(part);
        total = fused(v, v, total);
    }
    float factor = 1.0f / sqrtf(sum(total) / (float)K + eps);
    for (long k = 0; k < K; k++)
        put(out, k, get(x, k, half) * factor * get(weight, k, half), half);
}

INLINE void swiglu_row(const void *restrict gate_up, void *restrict out, long K, int half)
{
    for (long k = 0; k < K; k++) {
        float gate = get(gate_up, k, half);
        float silu = gate / (1.0f + exponential(-gate));
        put(out, k, rounded(silu, half) * get(gate_up, K + k, half), half);
    }
}

/* The head is rotated by half its width: x cos + roll(x) sin, the first product rounded. */
INLINE void rope_head(const void *restrict x, const void *restrict cosine,
                      const void *restrict sine, void *restrict out, long dim, int half)
{
    long middle = dim / 2;
    for (long i = 0; i < middle; i++) {
        float low = get(x, i, half), high = get(x, middle + i, half);
        float left = rounded(low * get(cosine, i, half), half);
        float right = rounded(high * get(cosine, middle + i, half), half);
        put(out, i, left + high * get(sine, i, half), half);
        put(out, middle + i, right + low * get(sine, middle + i, half), half);
    }
}

/* Calls ROW for every row: on one thread where the work is small. */
#define FOR_ROWS(row, rows, elements, threads, ROW)                                                \
    if ((rows) * (elements) < SERIAL || (threads) == 1) {                                          \
        for (long row = 0; row < (rows); row++)                                                    \
            ROW;                                                                                   \
    } else {                                                                                       \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                          \
        for (long row = 0; row < (rows); row++)                                                    \
            ROW;                                                                                   \
    }

#define ROW_OPERATIONS(suffix, half)                                                               \
    /* out[row] = x[row] / sqrt(mean(x[row]**2) + eps) * weight, all [rows, K] */                  \
    void speckv_rms_norm_##suffix(const char *x, const char *weight, char *out, long rows, long K, \
                                  float eps, int threads)                                          \
    {                                                                                              \
        long bytes = K * size(half);                                                               \
        FOR_ROWS(row, rows, K, threads,                                                            \
                 norm_row(x + row * bytes, weight, out + row * bytes, K, eps, half))               \
    }                                                                                              \
    /* out [rows, K] = silu(gate) * up of gate_up [rows, 2 K] */                                   \
    void speckv_swiglu_##suffix(const char *gate_up, char *out, long rows, long K, int threads)    \
    {                                                                                              \
        long bytes = K * size(half);                                                               \
        FOR_ROWS(row, rows, K, threads,                                                            \
                 swiglu_row(gate_up + 2 * row * bytes, out + row * bytes, K, half))                \
    }                                                                                              \
    /* x, cosine, sine, out: [heads, dim], the heads of all rows in one line */                    \
    void speckv_rope_##suffix(const char *x, const char *cosine, const char *sine, char *out,      \
                              long heads, long dim, int threads)                                   \
    {                                                                                              \
        long bytes = dim * size(half);                                                             \
        FOR_ROWS(head, heads, dim, threads,                                                        \
                 rope_head(x + head * bytes, cosine + head * bytes, sine + head * bytes,           \
                           out + head * bytes, dim, half))                                         \
    }

ROW_OPERATIONS(f32, 0)
ROW_OPERATIONS(bf16, 1)
