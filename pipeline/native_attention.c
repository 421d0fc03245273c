// Causal attention of heads of WIDTH numbers and its gradient; see native_attention.py. GNU C for its vectors.
//
// A vector holds one number of each of 16 queries (or keys); the other side comes one key (or query) after another, four
// at a time, so that what is loaded serves four products. Weights are powers of 2: the scale has log2(e) in it.

#include <math.h>
#include <stdint.h>

#define LANES 16
#define CHUNK 64 // keys whose scores are held at once; a multiple of LANES: no query has a chunk without a key of its own
#define MOST 4   // keys (or queries) at a time
#define LOG2_E 1.44269504f
#define INLINE static inline __attribute__((always_inline))
#define EACH_D for (int d = 0; d < WIDTH; d++)
#define EACH_U for (int u = 0; u < count; u++)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef struct {
    float *data;
    int64_t batch, head, token; // strides; that of the width is 1
} tensor;
typedef struct {
    int64_t batch, first, length;
} row;
typedef struct {
    float *data;
    int64_t stride;
} tokens; // of one head in one row

static const ints NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE floats all(float x) { return x - (floats){}; }

INLINE floats pick(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// For x <= 0.5 to 2e-7 of its value; 0 below -126; NaN stays NaN.
INLINE floats power_of_2(floats x) {
    ints whole = __builtin_convertvector(x - 0.5f, ints);
    floats part = x - __builtin_convertvector(whole, floats);
    floats sum = 1.54614449e-4f * part + 1.34004280e-3f; // 2^part between -0.5 and 0.5, interpolated at Chebyshev's nodes
    sum = sum * part + 9.61805694e-3f;
    sum = sum * part + 5.55032715e-2f;
    sum = sum * part + 2.40226507e-1f;
    sum = sum * part + 6.93147182e-1f;
    sum = sum * part + 1.0f;
    return pick(x < -126.0f, (floats){}, sum * (floats)((whole + 127) << 23));
}

INLINE row find_row(const int32_t *ends, int64_t number, int64_t num_tokens) {
    if (!ends)
        return (row){number, 0, num_tokens};
    return (row){0, ends[number], ends[number + 1] - ends[number]};
}

INLINE tokens of(tensor t, row r, int64_t head) {
    return (tokens){t.data + r.batch * t.batch + head * t.head + r.first * t.token, t.token};
}

INLINE tokens after(tokens t, int64_t number) { return (tokens){t.data + number * t.stride, t.stride}; }

// The next tokens, one a lane, times a factor; lanes without one are 0.
INLINE void load(floats *to, tokens from, int64_t count, float factor) {
    EACH_D to[d] = (floats){};
    for (int64_t l = 0; l < count; l++)
        EACH_D to[d][l] = from.data[l * from.stride + d] * factor;
}

INLINE void store(tokens to, int64_t count, const floats *from, float factor) {
    for (int64_t l = 0; l < count; l++)
        EACH_D to.data[l * to.stride + d] = from[d][l] * factor;
}

// Lanes are the queries from i on; here come the `count` keys from j on.
INLINE void score(int count, floats *scores, floats *most, const floats *query, tokens key, int64_t i, int64_t j) {
    floats s[MOST];
    EACH_U s[u] = query[0] * key.data[u * key.stride];
    for (int d = 1; d < WIDTH; d++)
        EACH_U s[u] += query[d] * key.data[u * key.stride + d];
    EACH_U {
        if (j + u > i)
            s[u] = pick(NUMBERS >= (int)(j + u - i), s[u], all(-INFINITY));
        *most = pick(s[u] > *most, s[u], *most);
        scores[u] = s[u];
    }
}

INLINE void add_values(int count, floats *output, floats *total, const floats *scores, floats most, tokens value) {
    floats weight[MOST];
    EACH_U weight[u] = power_of_2(scores[u] - most);
    EACH_U *total += weight[u];
    EACH_D EACH_U output[d] += weight[u] * value.data[u * value.stride + d];
}

static void forward_head(tokens q, tokens k, tokens v, tokens out, float *logs, int64_t length, float scale) {
    floats query[WIDTH], output[WIDTH], scores[CHUNK];
    for (int64_t i = 0; i < length; i += LANES) {
        int64_t num_queries = least(LANES, length - i), end = i + num_queries;
        floats most = all(-INFINITY), total = {};
        load(query, after(q, i), num_queries, scale * LOG2_E);
        EACH_D output[d] = (floats){};
        for (int64_t first = 0; first < end; first += CHUNK) {
            int64_t n = least(CHUNK, end - first), j = 0;
            tokens key = after(k, first), value = after(v, first);
            floats before = most;
            for (; j + MOST <= n; j += MOST)
                score(MOST, scores + j, &most, query, after(key, j), i, first + j);
            for (; j < n; j++)
                score(1, scores + j, &most, query, after(key, j), i, first + j);
            floats shrunk = power_of_2(before - most);
            total *= shrunk;
            EACH_D output[d] *= shrunk;
            for (j = 0; j + MOST <= n; j += MOST)
                add_values(MOST, output, &total, scores + j, most, after(value, j));
            for (; j < n; j++)
                add_values(1, output, &total, scores + j, most, after(value, j));
        }
        EACH_D output[d] /= total;
        store(after(out, i), num_queries, output, 1.0f);
        for (int64_t l = 0; l < num_queries; l++)
            logs[i + l] = most[l] + log2f(total[l]);
    }
}

// Lanes are the queries from i on, `to_output` their outputs' gradients; here come the `count` keys from j on.
INLINE void add_to_queries(int count, floats *to_query, const floats *query, const floats *to_output, floats log,
                           floats product, tokens key, tokens value, int64_t i, int64_t j) {
    floats s[MOST], g[MOST];
    EACH_U {
        s[u] = -log;
        g[u] = -product;
    }
    EACH_D EACH_U {
        s[u] += query[d] * key.data[u * key.stride + d];
        g[u] += to_output[d] * value.data[u * value.stride + d];
    }
    EACH_U {
        g[u] *= power_of_2(s[u]);
        if (j + u > i)
            g[u] = pick(NUMBERS >= (int)(j + u - i), g[u], (floats){});
    }
    EACH_D EACH_U to_query[d] += g[u] * key.data[u * key.stride + d];
}

// Lanes are the keys from j on; here come the `count` queries from i on.
INLINE void add_to_keys(int count, floats *to_key, floats *to_value, const floats *key, const floats *value, tokens q,
                        tokens to_output, const float *logs, const float *products, int64_t i, int64_t j) {
    floats s[MOST], g[MOST];
    EACH_U {
        s[u] = all(-logs[u]);
        g[u] = all(-products[u]);
    }
    EACH_D EACH_U {
        s[u] += key[d] * q.data[u * q.stride + d];
        g[u] += value[d] * to_output.data[u * to_output.stride + d];
    }
    EACH_U {
        s[u] = power_of_2(s[u]);
        if (i + u < j + LANES)
            s[u] = pick(NUMBERS <= (int)(i + u - j), s[u], (floats){});
        g[u] *= s[u];
    }
    EACH_D EACH_U {
        to_key[d] += g[u] * q.data[u * q.stride + d];
        to_value[d] += s[u] * to_output.data[u * to_output.stride + d];
    }
}

static void to_queries_of_head(tokens q, tokens k, tokens v, tokens to_output, tokens to_query, const float *logs,
                               const float *products, int64_t length, float scale) {
    floats query[WIDTH], gradient[WIDTH], sum[WIDTH];
    for (int64_t i = 0; i < length; i += LANES) {
        int64_t num_queries = least(LANES, length - i), end = i + num_queries, j = 0;
        floats log = {}, product = {};
        load(query, after(q, i), num_queries, scale * LOG2_E);
        load(gradient, after(to_output, i), num_queries, 1.0f);
        for (int64_t l = 0; l < num_queries; l++) {
            log[l] = logs[i + l];
            product[l] = products[i + l];
        }
        EACH_D sum[d] = (floats){};
        for (; j + MOST <= end; j += MOST)
            add_to_queries(MOST, sum, query, gradient, log, product, after(k, j), after(v, j), i, j);
        for (; j < end; j++)
            add_to_queries(1, sum, query, gradient, log, product, after(k, j), after(v, j), i, j);
        store(after(to_query, i), num_queries, sum, scale);
    }
}

void forward(tensor q, tensor k, tensor v, tensor out, float *logs, const int32_t *ends, int64_t num_rows,
             int64_t num_heads, int64_t num_key_heads, int64_t num_tokens, int num_threads, float scale) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < num_rows * num_heads; task++) {
        row r = find_row(ends, task / num_heads, num_tokens);
        int64_t head = task % num_heads, key_head = head / (num_heads / num_key_heads);
        float *own = logs + (r.batch * num_heads + head) * num_tokens + r.first;
        forward_head(of(q, r, head), of(k, r, key_head), of(v, r, key_head), of(out, r, head), own, r.length, scale);
    }
}

// `products`: room for each query's gradient times its output, [batch, heads, tokens].
void backward(tensor q, tensor k, tensor v, tensor out, float *logs, const int32_t *ends, int64_t num_rows,
              int64_t num_heads, int64_t num_key_heads, int64_t num_tokens, int num_threads, float scale,
              tensor to_out, tensor to_q, tensor to_k, tensor to_v, float *products) {
    int64_t num_shared = num_heads / num_key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < num_rows * num_key_heads; task++) {
        row r = find_row(ends, task / num_key_heads, num_tokens);
        int64_t key_head = task % num_key_heads, first_head = key_head * num_shared;
        int64_t first_number = (r.batch * num_heads + first_head) * num_tokens + r.first;
        tokens key_tokens = of(k, r, key_head), value_tokens = of(v, r, key_head);
        for (int64_t h = 0; h < num_shared; h++) {
            tokens gradient = of(to_out, r, first_head + h), output = of(out, r, first_head + h);
            float *own = products + first_number + h * num_tokens;
            for (int64_t i = 0; i < r.length; i++) {
                own[i] = 0.0f;
                EACH_D own[i] += gradient.data[i * gradient.stride + d] * output.data[i * output.stride + d];
            }
            to_queries_of_head(of(q, r, first_head + h), key_tokens, value_tokens, gradient, of(to_q, r, first_head + h),
                               logs + first_number + h * num_tokens, own, r.length, scale);
        }
        for (int64_t j = 0; j < r.length; j += LANES) {
            int64_t num_keys = least(LANES, r.length - j);
            floats key[WIDTH], value[WIDTH], to_key[WIDTH], to_value[WIDTH];
            load(key, after(key_tokens, j), num_keys, scale * LOG2_E);
            load(value, after(value_tokens, j), num_keys, 1.0f);
            EACH_D to_key[d] = to_value[d] = (floats){};
            for (int64_t h = 0; h < num_shared; h++) {
                tokens query = of(q, r, first_head + h), gradient = of(to_out, r, first_head + h);
                const float *log = logs + first_number + h * num_tokens, *product = products + first_number + h * num_tokens;
                int64_t i = j;
                for (; i + MOST <= r.length; i += MOST)
                    add_to_keys(MOST, to_key, to_value, key, value, after(query, i), after(gradient, i), log + i,
                                product + i, i, j);
                for (; i < r.length; i++)
                    add_to_keys(1, to_key, to_value, key, value, after(query, i), after(gradient, i), log + i,
                                product + i, i, j);
            }
            store(after(of(to_k, r, key_head), j), num_keys, to_key, scale);
            store(after(of(to_v, r, key_head), j), num_keys, to_value, 1.0f);
        }
    }
}
