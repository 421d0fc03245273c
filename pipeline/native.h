// Vectors of 16 floats in GNU C, for the kernels beside this file.

#include <math.h>
#include <omp.h>
#include <stdint.h>

#define LANES 16
#define LOG2_E 1.44269504f
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static const ints NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE floats all(float x) { return x - (floats){}; }

INLINE floats pick(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// For x <= 0.5 to 2e-7 of its value; NaN stays NaN. 0 below -64, where a weight is lost in any sum: smaller ones make
// products that are subnormal, with which a CPU can be ten times slower.
INLINE floats power_of_2(floats x) {
    ints whole = __builtin_convertvector(x - 0.5f, ints);
    floats part = x - __builtin_convertvector(whole, floats);
    floats sum = 1.54614449e-4f * part + 1.34004280e-3f; // 2^part, interpolated at Chebyshev's nodes
    sum = sum * part + 9.61805694e-3f;
    sum = sum * part + 5.55032715e-2f;
    sum = sum * part + 2.40226507e-1f;
    sum = sum * part + 6.93147182e-1f;
    sum = sum * part + 1.0f;
    return pick(x < -64.0f, (floats){}, sum * (floats)((whole + 127) << 23));
}
