/* `draft_step`, `verify` and `best_gamma` of reference.py, for the CPU path; C99 with GNU extensions.
 *
 * Semantics, ties and errors are the reference's. AT_* are the names of layout.py, given on the
 * command line. Rows are handled one after the other, on one thread: all of this takes microseconds.
 * Sums over a vocabulary have the order of the compiler's vectors, the same in every call.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum {
    LANES = 16,  /* Philox counters at a time */
    BLOCK = 1024 /* values looked through at a time */
};

#define INLINE static inline __attribute__((always_inline))

/* Draws of `gumbel` lie between -3.2 and 22.9; see _GUMBEL_SPREAD. */
static const float GUMBEL_MOST = 23.0f;

INLINE float get(const char *row, long i, int half)
{
    if (half) {
        uint16_t bits;
        memcpy(&bits, row + 2 * i, sizeof bits);
        uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    float value;
    memcpy(&value, row + 4 * i, sizeof value);
    return value;
}

/* exp of d <= 0 within 2 ulp; of anything below -87, about 1e-38. */
INLINE float exp_of(float d)
{
    d = d > -87.0f ? d : -87.0f;
    float n = (d * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    float r = (d - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

typedef struct {
    float value;
    long index; /* the lowest of equals; -1: NaN, +inf or nothing but -inf is among the values */
} Top;

INLINE Top top_of(const char *x, long n, int half)
{
    Top top = {-INFINITY, -1};
    float most = -INFINITY;
    int bad = 0;

#pragma omp simd reduction(max : most) reduction(| : bad)
    for (long i = 0; i < n; i++) {
        float v = get(x, i, half);
        most = v > most ? v : most;
        bad |= !(v <= FLT_MAX);
    }
    top.value = most;
    if (bad || most == -INFINITY)
        return top;
    for (long block = 0; top.index < 0; block += BLOCK) {
        long end = block + BLOCK < n ? block + BLOCK : n;
        int there = 0;
#pragma omp simd reduction(| : there)
        for (long i = block; i < end; i++)
            there |= get(x, i, half) == most;
        for (long i = block; there && top.index < 0; i++)
            if (get(x, i, half) == most)
                top.index = i;
    }
    return top;
}

/* [entropy in bits, confidence, margin, probability of `token`]; see `token_signals`. */
INLINE void signals_of(const char *x, long n, Top top, long token, float *out, int half)
{
    float sum = 0, weighted = 0, second = -INFINITY;
    int equals = 0;

#pragma omp simd reduction(+ : sum, weighted, equals) reduction(max : second)
    for (long i = 0; i < n; i++) {
        float v = get(x, i, half), d = v - top.value;
        d = d > -1e4f ? d : -1e4f;
        float e = exp_of(d), below = v < top.value ? v : -INFINITY;
        sum += e;
        weighted += e * d;
        second = below > second ? below : second;
        equals += v == top.value;
    }
    if (equals > 1)
        second = top.value;
    double confidence = 1.0 / sum, bits = log((double)sum) - (double)weighted / sum;
    out[0] = (float)((bits > 0 ? bits : 0) / 0.69314718055994530942);
    out[1] = (float)confidence;
    out[2] = (float)(confidence - exp((double)second - top.value) / sum);
    out[3] = (float)(exp((double)get(x, token, half) - top.value) / sum);
}

typedef struct {
    uint64_t seed;
    uint32_t request, index, purpose;
} Noise;

/* Philox4x32-10 at counters (c0[l], index, request, purpose). */
INLINE void philox(const uint32_t *c0, Noise at, uint32_t (*words)[LANES])
{
    uint32_t k0 = (uint32_t)at.seed, k1 = (uint32_t)(at.seed >> 32);
    for (int l = 0; l < LANES; l++) {
        words[0][l] = c0[l];
        words[1][l] = at.index;
        words[2][l] = at.request;
        words[3][l] = at.purpose;
    }
    for (int round = 0; round < 10; round++) {
#pragma omp simd
        for (int l = 0; l < LANES; l++) {
            uint64_t low = (uint64_t)words[0][l] * 0xD2511F53u;
            uint64_t high = (uint64_t)words[2][l] * 0xCD9E8D57u;
            words[0][l] = (uint32_t)(high >> 32) ^ words[1][l] ^ k0;
            words[2][l] = (uint32_t)(low >> 32) ^ words[3][l] ^ k1;
            words[1][l] = (uint32_t)high;
            words[3][l] = (uint32_t)low;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

INLINE float uniform(uint32_t word)
{
    float u = ((float)word + 0.5f) * 2.3283064365386963e-10f;
    return u < 1.0f - 5.9604644775390625e-8f ? u : 1.0f - 5.9604644775390625e-8f;
}

static float gumbel(float u)
{
    float series = u * (1.0f + u * (0.5f + u * (1.0f / 3.0f)));
    return -logf(u < 0.0078125f ? series : -logf(1.0f - u));
}

typedef struct {
    float score;
    long index;
} Best;

INLINE void offer(Best *best, float y, float u, long i)
{
    float score = y + gumbel(u);
    if (score > best->score || (score == best->score && i < best->index)) {
        best->score = score;
        best->index = i;
    }
}

/* Whether gumbel(u) may reach `gap`: for that u < exp(-gap). Saves the logarithms. */
INLINE int may_win(float gap, float u)
{
    return u <= 1.01f * exp_of(gap < 0 ? 0 : -gap);
}

/* argmax of x * inv + gumbel over x >= low, with the noise of token id ids[i], or i without ids. */
INLINE long sampled(const char *x, long n, float inv, float low, Noise at, const int32_t *ids,
                    int half)
{
    Best best = {-INFINITY, -1};
    long step = ids ? LANES : 4 * LANES;

    for (long i = 0; i < n; i += step) {
        uint32_t c0[LANES], words[4][LANES];
        float y[4 * LANES];
        long count = n - i < step ? n - i : step;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (long k = 0; k < count; k++) {
            float v = get(x, i + k, half);
            y[k] = v >= low ? v * inv : -INFINITY;
            most = y[k] > most ? y[k] : most;
        }
        if (most == -INFINITY || most + GUMBEL_MOST < best.score)
            continue;
        for (int l = 0; l < LANES; l++)
            c0[l] = ids ? (uint32_t)ids[l < count ? i + l : i] >> 2 : (uint32_t)(i / 4 + l);
        philox(c0, at, words);
        if (!ids) {
            int any = 0;
            for (long k = count; k < 4 * LANES; k++)
                y[k] = -INFINITY;
            for (int w = 0; w < 4; w++)
#pragma omp simd reduction(| : any)
                for (int l = 0; l < LANES; l++)
                    any |= may_win(best.score - y[4 * l + w], uniform(words[w][l]));
            if (!any)
                continue;
        }
        for (long k = 0; k < count; k++) {
            uint32_t word = ids ? words[ids[i + k] & 3][k] : words[k & 3][k >> 2];
            if (y[k] > -INFINITY && may_win(best.score - y[k], uniform(word)))
                offer(&best, y[k], uniform(word), i + k);
        }
    }
    return best.index;
}

/* `_best_token`, and for a draft's row `_draft_token`: an index into the row, or -1. */
INLINE long token_of(const char *x, long n, Top top, float inv, float low, const Noise *noise,
                     const int32_t *ids, int half)
{
    if (top.index < 0 || inv == 0 || !noise)
        return top.index;
    return sampled(x, n, inv, low, *noise, ids, half);
}

/* The candidate γ of the highest value, the lowest among equals; see reference.best_gamma. */
static int best_gamma(const float *policy, const int32_t *rows, const float *running,
                      double acceptance)
{
    float features[AT_FEATURES] = {0}, hidden[AT_HIDDEN], tokens[AT_WIDTH_MAX];
    const float *weight = policy + AT_HIDDEN_WEIGHT, *scale = policy + AT_FEATURE_SCALE;
    const float *of_gamma = weight + AT_FEATURE_GAMMA * AT_HIDDEN;
    const float *output = policy + AT_OUTPUT_WEIGHT, *bias = policy + AT_OUTPUT_BIAS;

    memcpy(features, running, AT_FEATURE_DRAFTED * sizeof *features);
    features[AT_FEATURE_DRAFTED] = (float)rows[AT_DRAFTED];
    features[AT_FEATURE_COMPRESSION + (int)policy[AT_COMPRESSION]] = 1;
    features[AT_FEATURE_ACCEPTANCE] = (float)acceptance;
    features[AT_FEATURE_MATCH] = (float)rows[AT_MATCH_LENGTH];
    features[AT_FEATURE_TEMPERATURE] = policy[AT_TEMPERATURE];
    for (int i = 0; i < AT_FEATURES; i++)
        features[i] = (features[i] - policy[AT_FEATURE_MEAN + i]) * scale[i];
    for (int h = 0; h < AT_HIDDEN; h++) {
        float sum = 0;
        for (int i = 0; i < AT_FEATURES; i++)
            sum += weight[i * AT_HIDDEN + h] * features[i];
        hidden[h] = sum + policy[AT_HIDDEN_BIAS + h];
    }
    tokens[0] = 1;
    if ((int)policy[AT_MLP_LAYOUT] == AT_LAYOUT_PAPER)
        for (int g = 0; g < AT_WIDTH_MAX; g++) {
            float rate = 0, by_gamma = (float)g * scale[AT_FEATURES - 1];
            for (int h = 0; h < AT_HIDDEN; h++)
                rate += fmaxf(hidden[h] + by_gamma * of_gamma[h], 0) * output[h * AT_OUTPUTS];
            tokens[g] = fminf(fmaxf(rate + bias[0], 0), 1) * (float)g + 1;
        }
    else
        for (int g = 1; g < AT_WIDTH_MAX; g++) {
            float logit = 0;
            for (int h = 0; h < AT_HIDDEN; h++)
                logit += output[h * AT_OUTPUTS + g - 1] * fmaxf(hidden[h], 0);
            tokens[g] = tokens[g - 1] + (0.5f + 0.5f * tanhf(0.5f * (logit + bias[g - 1])));
        }
    float trust = 1, rate = 0;
    if (policy[AT_EXPECTED_ACCEPTANCE] > 0)
        trust = (float)fmin(acceptance / policy[AT_EXPECTED_ACCEPTANCE], 1);
    if ((int)policy[AT_OBJECTIVE] == AT_OBJECTIVE_RATE)
        rate = policy[AT_RATE];
    int best = 0;
    float most = -INFINITY;
    for (int g = 0; g < AT_WIDTH_MAX; g++) {
        float ms = policy[AT_COST + g] + policy[AT_COST_PER_TOKEN + g] * (float)rows[AT_LENGTH];
        float value = 1 + (tokens[g] - 1) * trust;
        value = rate > 0 ? value - rate * ms : value;
        if ((int)policy[AT_CANDIDATES] >> g & 1 && value > most) {
            most = value;
            best = g;
        }
    }
    return best;
}

/* Whether drafting stops now; see reference.decide. */
static int decide(const float *policy, const int32_t *rows, const float *running, double acceptance)
{
    int drafted = rows[AT_DRAFTED], room = rows[AT_LIMIT] - rows[AT_LENGTH] - 1;
    int cap = (int)policy[AT_GAMMA_CAP], mode = (int)policy[AT_MODE];
    int probe = (int)policy[AT_PROBE_EVERY];

    if (drafted >= (cap < room ? cap : room))
        return 1;
    if (mode == AT_MODE_FIXED)
        return 0;
    if (mode == AT_MODE_ENTROPY)
        return drafted > 0 && running[AT_LAST_ENTROPY] > policy[AT_THRESHOLD];
    if (mode == AT_MODE_CONFIDENCE)
        return drafted > 0 && running[AT_LAST_CONFIDENCE] < policy[AT_THRESHOLD];
    if (drafted == 0 &&
        (running[AT_LAST_ENTROPY] < 0 || (probe > 0 && probe <= rows[AT_PLAIN_RUN])))
        return 0;
    return drafted >= best_gamma(policy, rows, running, acceptance);
}

int speckv_best_gamma(const float *policy, const int32_t *rows, const float *running,
                      double acceptance)
{
    return best_gamma(policy, rows, running, acceptance);
}

/* `fold_signals`. */
static void fold(float *running, const float *signals, int drafted)
{
    double entropy = signals[AT_ENTROPY], sure = signals[AT_CONFIDENCE];
    if (drafted == 0) {
        running[AT_MEAN_ENTROPY] = running[AT_MAX_ENTROPY] = signals[AT_ENTROPY];
        running[AT_MEAN_CONFIDENCE] = running[AT_MIN_CONFIDENCE] = signals[AT_CONFIDENCE];
    } else {
        double share = 1.0 / (drafted + 1);
        double mean = running[AT_MEAN_ENTROPY], mean_sure = running[AT_MEAN_CONFIDENCE];
        running[AT_MEAN_ENTROPY] = (float)(mean + (entropy - mean) * share);
        running[AT_MAX_ENTROPY] = fmaxf(running[AT_MAX_ENTROPY], signals[AT_ENTROPY]);
        running[AT_MEAN_CONFIDENCE] = (float)(mean_sure + (sure - mean_sure) * share);
        running[AT_MIN_CONFIDENCE] = fminf(running[AT_MIN_CONFIDENCE], signals[AT_CONFIDENCE]);
    }
    running[AT_LAST_ENTROPY] = signals[AT_ENTROPY];
    running[AT_LAST_CONFIDENCE] = signals[AT_CONFIDENCE];
    running[AT_LAST_MARGIN] = signals[AT_MARGIN];
}

INLINE void draft_row(const char *x, long n, const float *policy, int32_t *rows, float *running,
                      int32_t *sequence, float *signals, const int32_t *ids, float inv, float low,
                      const int64_t *seed, int rejection, int half)
{
    int drafted = rows[AT_DRAFTED], place = rows[AT_MATCH] + drafted;
    Noise noise = {0, (uint32_t)rows[AT_REQUEST], (uint32_t)(rows[AT_LENGTH] + drafted),
                   AT_NOISE_COUPLED};
    if (seed)
        noise.seed = (uint64_t)*seed;
    if (rejection) {
        noise.index = (uint32_t)rows[AT_STEP];
        noise.purpose = AT_NOISE_DRAFT | (uint32_t)drafted << 8;
    }
    Top top = top_of(x, n, half);
    long token = token_of(x, n, top, inv, low, seed ? &noise : 0, ids, half);
    if (token < 0) {
        rows[AT_ERROR] |= AT_ERROR_DRAFT;
        rows[AT_STOP] = 1;
        rows[AT_DONE] = AT_DONE_ERROR;
        return;
    }
    float *own = signals + drafted * AT_SIGNALS;
    signals_of(x, n, top, token, own, half);
    fold(running, own, drafted);
    int32_t id = ids ? ids[token] : (int32_t)token;
    if (place >= rows[AT_LENGTH] || sequence[place] != id)
        rows[AT_MATCH_LENGTH] = 0;
    sequence[rows[AT_LENGTH] + drafted] = id;
    rows[AT_DRAFTED] = drafted + 1;
    rows[AT_STOP] = decide(policy, rows, running, running[AT_ACCEPTANCE]);
}

/* `latest_match` of the first n tokens. */
static void latest_match(const int32_t *text, long n, int32_t *rows)
{
    rows[AT_MATCH] = rows[AT_MATCH_LENGTH] = 0;
    for (long end = n - 2; end >= 0 && rows[AT_MATCH_LENGTH] < AT_MATCH_MAX; end--) {
        int length = 0;
        while (length < AT_MATCH_MAX && length <= end && text[end - length] == text[n - 1 - length])
            length++;
        if (length > rows[AT_MATCH_LENGTH]) {
            rows[AT_MATCH] = (int32_t)end + 1;
            rows[AT_MATCH_LENGTH] = length;
        }
    }
}

/* `_commit` of the first `accepted` draft tokens, which stand in the sequence, and of `last`. */
static void commit(const float *policy, int32_t *rows, float *running, int32_t *sequence,
                   int accepted, long last, const int32_t *eos, long ends)
{
    if (last < 0) {
        rows[AT_ERROR] |= AT_ERROR_TARGET;
        rows[AT_DONE] = AT_DONE_ERROR;
        rows[AT_COMMITTED] = 0;
        return;
    }
    int gamma = rows[AT_DRAFTED], room = rows[AT_LIMIT] - rows[AT_LENGTH], stops = 0;
    int count = accepted + 1 < room ? accepted + 1 : room;
    int32_t *text = sequence + rows[AT_LENGTH];
    double acceptance = running[AT_ACCEPTANCE];

    for (int i = 0; i < count && !stops; i++) {
        int32_t token = i < accepted ? text[i] : (int32_t)last;
        for (long e = 0; e < ends && !stops; e++)
            stops = token == eos[e];
        count = stops ? i + 1 : count;
    }
    if (count > accepted)
        text[accepted] = (int32_t)last;
    rows[AT_ACCEPTED] = accepted < count ? accepted : count;
    if (gamma) {
        acceptance += policy[AT_EMA_WEIGHT] * ((double)accepted / gamma - acceptance);
        running[AT_ACCEPTANCE] = (float)acceptance;
    }
    rows[AT_LENGTH] += count;
    rows[AT_GAMMA] = gamma;
    rows[AT_COMMITTED] = count;
    rows[AT_DRAFTED] = 0;
    rows[AT_STEP]++;
    rows[AT_PLAIN_RUN] = gamma ? 0 : rows[AT_PLAIN_RUN] + 1;
    if (stops)
        rows[AT_DONE] = AT_DONE_STOP;
    else if (count == room)
        rows[AT_DONE] = AT_DONE_LENGTH;
    else if (policy[AT_MATCHES] != 0)
        latest_match(sequence, rows[AT_LENGTH], rows);
    rows[AT_STOP] = rows[AT_DONE] ? 1 : decide(policy, rows, running, acceptance);
}

INLINE void verify_row(const char *x, long bytes, long n, const float *policy, int32_t *rows,
                       float *running, int32_t *sequence, const int32_t *eos, long ends, float inv,
                       const float *lows, const int64_t *seed, int half)
{
    Noise noise = {0, (uint32_t)rows[AT_REQUEST], 0, AT_NOISE_COUPLED};
    int accepted = 0;
    long token;

    if (seed)
        noise.seed = (uint64_t)*seed;
    for (;; accepted++, x += bytes) {
        noise.index = (uint32_t)(rows[AT_LENGTH] + accepted);
        token = token_of(x, n, top_of(x, n, half), inv, lows ? lows[accepted] : -INFINITY,
                         seed ? &noise : 0, 0, half);
        if (accepted == rows[AT_DRAFTED] || token != sequence[rows[AT_LENGTH] + accepted])
            break;
    }
    commit(policy, rows, running, sequence, accepted, token, eos, ends);
}

/* Strides are in elements; `inv`, `seeds`, `ids` and `cutoffs` may be null. */
#define STEPS(suffix, half)                                                                        \
    void speckv_draft_step_##suffix(                                                               \
        const char *logits, long stride, long n, long batch, const float *policy, int32_t *rows,   \
        float *running, int32_t *sequence, long capacity, float *signals, const int32_t *ids,      \
        const float *inv, const int64_t *seeds, const float *cutoffs, int rejection)               \
    {                                                                                              \
        for (long b = 0; b < batch; b++) {                                                         \
            int32_t *own = rows + b * AT_ROW_WORDS;                                                \
            if (!own[AT_DONE] && !own[AT_STOP])                                                    \
                draft_row(logits + b * stride * (half ? 2 : 4), n, policy, own,                    \
                          running + b * AT_RUNNING_WORDS, sequence + b * capacity,                 \
                          signals + b * AT_GAMMA_MAX * AT_SIGNALS, ids, inv ? inv[b] : 0,          \
                          cutoffs ? cutoffs[b] : -INFINITY, seeds ? seeds + b : 0, rejection,      \
                          half);                                                                   \
        }                                                                                          \
    }                                                                                              \
    void speckv_verify_##suffix(const char *logits, long stride, long width_stride, long n,        \
                                long batch, const float *policy, int32_t *rows, float *running,    \
                                int32_t *sequence, long capacity, const int32_t *eos, long ends,   \
                                const float *inv, const int64_t *seeds, const float *cutoffs,      \
                                long width)                                                        \
    {                                                                                              \
        for (long b = 0; b < batch; b++) {                                                         \
            int32_t *own = rows + b * AT_ROW_WORDS;                                                \
            if (own[AT_DONE])                                                                      \
                own[AT_COMMITTED] = 0;                                                             \
            else                                                                                   \
                verify_row(logits + b * stride * (half ? 2 : 4), width_stride * (half ? 2 : 4), n, \
                           policy, own, running + b * AT_RUNNING_WORDS, sequence + b * capacity,   \
                           eos + b * ends, ends, inv ? inv[b] : 0,                                 \
                           cutoffs ? cutoffs + b * width : 0, seeds ? seeds + b : 0, half);        \
        }                                                                                          \
    }

STEPS(f32, 0)
STEPS(bf16, 1)
