// RMS norm, SwiGLU, rotary embeddings and their gradients, a pass over memory each; see native_layers.py.

#include <string.h>

#include "native.h"

#define EACH_TOKEN                                                                                                     \
    _Pragma("omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)") for (int64_t n = 0;     \
                                                                                                    n < num_tokens; n++)

// The numbers from x on; lanes beyond the count are 0.
INLINE floats load(const float *x, int64_t count) {
    floats to = {};
    if (count >= LANES)
        memcpy(&to, x, sizeof to);
    else
        memcpy(&to, x, count * sizeof *x);
    return to;
}

INLINE void store(float *to, floats from, int64_t count) {
    if (count >= LANES)
        memcpy(to, &from, sizeof from);
    else
        memcpy(to, &from, count * sizeof *to);
}

INLINE float sum(floats x) {
    float total = 0.0f;
    for (int l = 0; l < LANES; l++)
        total += x[l];
    return total;
}

INLINE floats sigmoid(floats x) {
    floats power = power_of_2(pick(x < 0.0f, x, -x) * LOG2_E); // of -|x|
    return pick(x < 0.0f, power, all(1.0f)) / (1.0f + power);
}

// y = weight x / sqrt(mean(x^2) + epsilon); `inverses`: what x is multiplied by, a number a token.
void norm(const float *x, const float *weight, float *y, float *inverses, int64_t num_tokens, int64_t width,
          float epsilon, int num_threads) {
    EACH_TOKEN {
        const float *from = x + n * width;
        floats squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            floats part = load(from + i, width - i);
            squares += part * part;
        }
        float inverse = 1.0f / sqrtf(sum(squares) / width + epsilon);
        for (int64_t i = 0; i < width; i += LANES)
            store(y + n * width + i, load(weight + i, width - i) * (load(from + i, width - i) * inverse), width - i);
        inverses[n] = inverse;
    }
}

void norm_backward(const float *to_y, const float *x, const float *weight, const float *inverses, float *to_x,
                   int64_t num_tokens, int64_t width, int num_threads) {
    EACH_TOKEN {
        const float *from = x + n * width, *gradient = to_y + n * width;
        float inverse = inverses[n];
        floats products = {};
        for (int64_t i = 0; i < width; i += LANES)
            products += load(gradient + i, width - i) * load(weight + i, width - i) * load(from + i, width - i);
        float along = sum(products) * inverse * inverse / width;
        for (int64_t i = 0; i < width; i += LANES) {
            floats scaled = load(gradient + i, width - i) * load(weight + i, width - i);
            store(to_x + n * width + i, (scaled - load(from + i, width - i) * along) * inverse, width - i);
        }
    }
}

// y = gate sigmoid(gate) up
void swiglu(const float *gate, const float *up, float *y, int64_t num_tokens, int64_t width, int num_threads) {
    EACH_TOKEN {
        for (int64_t i = n * width; i < (n + 1) * width; i += LANES) {
            int64_t count = (n + 1) * width - i;
            floats g = load(gate + i, count);
            store(y + i, g * sigmoid(g) * load(up + i, count), count);
        }
    }
}

void swiglu_backward(const float *to_y, const float *gate, const float *up, float *to_gate, float *to_up,
                     int64_t num_tokens, int64_t width, int num_threads) {
    EACH_TOKEN {
        for (int64_t i = n * width; i < (n + 1) * width; i += LANES) {
            int64_t count = (n + 1) * width - i;
            floats gradient = load(to_y + i, count), g = load(gate + i, count), share = sigmoid(g);
            store(to_up + i, gradient * g * share, count);
            store(to_gate + i, gradient * load(up + i, count) * share * (1.0f + g * (1.0f - share)), count);
        }
    }
}

typedef struct {
    float *data;
    int64_t batch, head, token; // strides; that of the width is 1
} tensor;

// Halves of a head: (x, y) to (x cos - y sin, y cos + x sin). Backward is the transposed matrix.
INLINE void rotate_head(const float *x, float *to, const float *cosine, const float *sine, int64_t half, int backward) {
    for (int64_t d = 0; d < half; d++) {
        float first = x[d], second = x[half + d];
        if (backward) {
            to[d] = first * cosine[d] + second * sine[half + d];
            to[half + d] = second * cosine[half + d] - first * sine[d];
        } else {
            to[d] = first * cosine[d] - second * sine[d];
            to[half + d] = second * cosine[half + d] + first * sine[half + d];
        }
    }
}

// Tokens count over the batch, of rows of `length`; cosine and sine are [batch or 1, length, 2 half].
void rotate(tensor x, tensor to, const float *cosine, const float *sine, int64_t angle_batch, int64_t num_tokens,
            int64_t length, int64_t num_heads, int64_t half, int backward, int num_threads) {
    EACH_TOKEN {
        int64_t batch = n / length, token = n % length, angle = batch * angle_batch + token * 2 * half;
        for (int64_t head = 0; head < num_heads; head++) {
            const float *from = x.data + batch * x.batch + head * x.head + token * x.token;
            float *into = to.data + batch * to.batch + head * to.head + token * to.token;
            switch (half) { // a loop of a known length is unrolled
            case 4: rotate_head(from, into, cosine + angle, sine + angle, 4, backward); break;
            case 32: rotate_head(from, into, cosine + angle, sine + angle, 32, backward); break;
            default: rotate_head(from, into, cosine + angle, sine + angle, half, backward);
            }
        }
    }
}
