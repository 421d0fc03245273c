// Causal attention of heads of WIDTH numbers and its gradient; see native_attention.py.
//
// A vector holds one number of each of 16 queries (or keys); the other side comes four keys (or queries) at a time, so
// that what is loaded serves four products. Weights are powers of 2: the scale has log2(e) in it.

#include "native.h"

#define CHUNK 64 // keys whose scores are held at once; a multiple of LANES, so that each query has a key in each chunk
#define MOST 4   // keys (or queries) at a time
#define EACH_D for (int d = 0; d < WIDTH; d++)
#define EACH_U for (int u = 0; u < count; u++)

#ifdef BFLOAT16
typedef uint16_t number;
#else
typedef float number;
#endif
typedef struct {
    number *data;
    int64_t batch, head, token; // strides; that of the width is 1
} tensor;
typedef struct {
    int64_t batch, first, length;
} row;
typedef struct {
    float *data;
    int64_t stride;
} tokens; // of one head in one row, in float32

// A weight is at most 1: where rounding gives a score more than the log of the sum, that is it.
INLINE floats weigh(floats score, floats log) {
    floats x = score - log;
    return power_of_2(pick(x > 0.0f, (floats){}, x));
}

INLINE row find_row(const int32_t *ends, int64_t number, int64_t num_tokens) {
    if (!ends)
        return (row){number, 0, num_tokens};
    return (row){0, ends[number], ends[number + 1] - ends[number]};
}

INLINE number *begin(tensor t, row r, int64_t head) {
    return t.data + r.batch * t.batch + head * t.head + r.first * t.token;
}

#ifdef BFLOAT16
// Where a head of the row is to be written: in the room, the number-th one there.
INLINE tokens place(tensor t, row r, int64_t head, float *room, int number_th) {
    return (tokens){room + number_th * r.length * WIDTH, WIDTH};
}

INLINE tokens read(tensor t, row r, int64_t head, float *room, int number_th) {
    tokens to = place(t, r, head, room, number_th);
    const number *from = begin(t, r, head);
    for (int64_t i = 0; i < r.length; i++)
        EACH_D ((uint32_t *)to.data)[i * WIDTH + d] = (uint32_t)from[i * t.token + d] << 16;
    return to;
}

// Rounds to the nearest, to even where two are as near; NaN stays NaN.
INLINE void write(tensor t, row r, int64_t head, tokens from) {
    number *to = begin(t, r, head);
    for (int64_t i = 0; i < r.length; i++) {
        EACH_D {
            uint32_t bits = ((const uint32_t *)from.data)[i * WIDTH + d];
            int is_nan = (bits & 0x7fffffff) > 0x7f800000;
            to[i * t.token + d] = is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        }
    }
}
#else
INLINE tokens place(tensor t, row r, int64_t head, float *room, int number_th) {
    return (tokens){begin(t, r, head), t.token};
}

INLINE tokens read(tensor t, row r, int64_t head, float *room, int number_th) {
    return place(t, r, head, room, number_th);
}

INLINE void write(tensor t, row r, int64_t head, tokens from) {}
#endif

INLINE tokens after(tokens t, int64_t number) { return (tokens){t.data + number * t.stride, t.stride}; }

// The next tokens, one a lane, times a factor; lanes without one are 0.
INLINE void load(floats *to, tokens from, int64_t count, float factor) {
    EACH_D to[d] = (floats){};
    for (int64_t l = 0; l < count; l++)
        EACH_D to[d][l] = from.data[l * from.stride + d] * factor;
}

INLINE void store(tokens to, int64_t count, const floats *from) {
    for (int64_t l = 0; l < count; l++)
        EACH_D to.data[l * to.stride + d] = from[d][l];
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
        store(after(out, i), num_queries, output);
        for (int64_t l = 0; l < num_queries; l++)
            logs[i + l] = most[l] + log2f(total[l]);
    }
}

// Lanes are the queries from i on, `to_output` their outputs' gradients; here come the `count` keys from j on.
INLINE void add_to_queries(int count, floats *to_query, const floats *query, const floats *to_output, floats log,
                           floats product, float scale, tokens key, tokens value, int64_t i, int64_t j) {
    floats s[MOST], g[MOST];
    EACH_U s[u] = g[u] = (floats){};
    EACH_D EACH_U {
        s[u] += query[d] * key.data[u * key.stride + d];
        g[u] += to_output[d] * value.data[u * value.stride + d];
    }
    EACH_U {
        g[u] = (g[u] - product) * weigh(s[u], log) * scale;
        if (j + u > i)
            g[u] = pick(NUMBERS >= (int)(j + u - i), g[u], (floats){});
    }
    EACH_D EACH_U to_query[d] += g[u] * key.data[u * key.stride + d];
}

// Lanes are the keys from j on; here come the `count` queries from i on.
INLINE void add_to_keys(int count, floats *to_key, floats *to_value, const floats *key, const floats *value, tokens q,
                        tokens to_output, const float *logs, const float *products, float scale, int64_t i, int64_t j) {
    floats s[MOST], g[MOST];
    EACH_U s[u] = g[u] = (floats){};
    EACH_D EACH_U {
        s[u] += key[d] * q.data[u * q.stride + d];
        g[u] += value[d] * to_output.data[u * to_output.stride + d];
    }
    EACH_U {
        s[u] = weigh(s[u], all(logs[u]));
        if (i + u < j + LANES)
            s[u] = pick(NUMBERS <= (int)(i + u - j), s[u], (floats){});
        g[u] = (g[u] - products[u]) * s[u] * scale;
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
            add_to_queries(MOST, sum, query, gradient, log, product, scale, after(k, j), after(v, j), i, j);
        for (; j < end; j++)
            add_to_queries(1, sum, query, gradient, log, product, scale, after(k, j), after(v, j), i, j);
        store(after(to_query, i), num_queries, sum);
    }
}

// Adds to what other queries of these keys gave, if it is said so.
static void to_keys_of_head(tokens q, tokens k, tokens v, tokens to_output, tokens to_k, tokens to_v, const float *logs,
                            const float *products, int64_t length, float scale, int adds) {
    floats key[WIDTH], value[WIDTH], key_sum[WIDTH], value_sum[WIDTH];
    for (int64_t j = 0; j < length; j += LANES) {
        int64_t num_keys = least(LANES, length - j), i = j;
        load(key, after(k, j), num_keys, scale * LOG2_E);
        load(value, after(v, j), num_keys, 1.0f);
        load(key_sum, after(to_k, j), adds ? num_keys : 0, 1.0f);
        load(value_sum, after(to_v, j), adds ? num_keys : 0, 1.0f);
        for (; i + MOST <= length; i += MOST)
            add_to_keys(MOST, key_sum, value_sum, key, value, after(q, i), after(to_output, i), logs + i, products + i,
                        scale, i, j);
        for (; i < length; i++)
            add_to_keys(1, key_sum, value_sum, key, value, after(q, i), after(to_output, i), logs + i, products + i,
                        scale, i, j);
        store(after(to_k, j), num_keys, key_sum);
        store(after(to_v, j), num_keys, value_sum);
    }
}

// `room`: for each thread `room_size` numbers, where 16-bit heads that a task works on are in float32.
void forward(tensor q, tensor k, tensor v, tensor out, float *logs, const int32_t *ends, int64_t num_rows,
             int64_t num_heads, int64_t num_key_heads, int64_t num_tokens, int num_threads, float scale, float *room,
             int64_t room_size) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < num_rows * num_heads; task++) {
        row r = find_row(ends, task / num_heads, num_tokens);
        int64_t head = task % num_heads, key_head = head / (num_heads / num_key_heads);
        float *own = room + omp_get_thread_num() * room_size;
        float *log = logs + (r.batch * num_heads + head) * num_tokens + r.first;
        tokens query = read(q, r, head, own, 0), key = read(k, r, key_head, own, 1);
        tokens value = read(v, r, key_head, own, 2), output = place(out, r, head, own, 3);
        forward_head(query, key, value, output, log, r.length, scale);
        write(out, r, head, output);
    }
}

// `products`: room for each query's gradient times its output, [batch, heads, tokens].
void backward(tensor q, tensor k, tensor v, tensor out, float *logs, const int32_t *ends, int64_t num_rows,
              int64_t num_heads, int64_t num_key_heads, int64_t num_tokens, int num_threads, float scale, float *room,
              int64_t room_size, tensor to_out, tensor to_q, tensor to_k, tensor to_v, float *products) {
    int64_t num_shared = num_heads / num_key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < num_rows * num_key_heads; task++) {
        row r = find_row(ends, task / num_key_heads, num_tokens);
        int64_t key_head = task % num_key_heads;
        float *own = room + omp_get_thread_num() * room_size;
        tokens k_head = read(k, r, key_head, own, 0), v_head = read(v, r, key_head, own, 1);
        tokens to_k_head = place(to_k, r, key_head, own, 2), to_v_head = place(to_v, r, key_head, own, 3);
        for (int64_t head = key_head * num_shared; head < (key_head + 1) * num_shared; head++) {
            int64_t first = (r.batch * num_heads + head) * num_tokens + r.first;
            tokens q_head = read(q, r, head, own, 4), gradient = read(to_out, r, head, own, 5);
            tokens output = read(out, r, head, own, 6), to_q_head = place(to_q, r, head, own, 7);
            const float *log = logs + first;
            float *product = products + first;
            for (int64_t i = 0; i < r.length; i++) {
                product[i] = 0.0f;
                EACH_D product[i] += gradient.data[i * gradient.stride + d] * output.data[i * output.stride + d];
            }
            to_queries_of_head(q_head, k_head, v_head, gradient, to_q_head, log, product, r.length, scale);
            to_keys_of_head(q_head, k_head, v_head, gradient, to_k_head, to_v_head, log, product, r.length, scale,
                            head > key_head * num_shared);
            write(to_q, r, head, to_q_head);
        }
        write(to_k, r, key_head, to_k_head);
        write(to_v, r, key_head, to_v_head);
    }
}
