/* STEP elements in registers: loading, converting, storing.
 *
 * With the vector extensions that gcc and clang share, so that one source serves every instruction set. Products and sums stay two
 * roundings (no contraction, no -ffast-math), so that a result does not depend on the machine.
 */

#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* PAIRED is bfloat16 whose even elements stay before the odd ones in registers and scratch, as they come out of a load; it saves
 * putting them in order where nothing asks for it. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, PAIRED = 3 };
enum { LANES = 8, STEP = 2 * LANES };

typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    floats low, high;
} step;

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

INLINE floats splat(float value) { return (floats){value, value, value, value, value, value, value, value}; }

INLINE words choose(words mask, words yes, words no) { return (mask & yes) | (~mask & no); }

INLINE step add(step a, step b) { return (step){a.low + b.low, a.high + b.high}; }

INLINE step multiply(step a, floats factor) { return (step){a.low * factor, a.high * factor}; }

INLINE step multiply_steps(step a, step b) { return (step){a.low * b.low, a.high * b.high}; }

INLINE double sum_lanes(step value)
{
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += (double)value.low[lane] + (double)value.high[lane];
    return sum;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

/* 32-bit words whose halves are two neighbouring elements, rounded: to nearest, ties to even; a NaN stays one, made quiet. */
INLINE words round_bfloat16(floats value)
{
    const words bits = (words)value;
    const words is_nan = (words)((bits & 0x7fffffff) > 0x7f800000);
    return choose(is_nan, bits | 0x400000, bits + 0x7fff + (bits >> 16 & 1));
}

#ifdef __F16C__
INLINE floats from_float16(halves bits) { return (floats)_mm256_cvtph_ps((__m128i)bits); }
INLINE halves to_float16(floats value) { return (halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE floats from_float16(halves half)
{
    const words bits = __builtin_convertvector(half, words);
    const words magnitude = (bits & 0x7fff) << 13;
    const words finite = (words)((floats)magnitude * splat(0x1p112f)); /* moves the exponent's bias; exact for subnormals too */
    const words quiet = (words)(magnitude > 0x0f800000) & 0x400000;
    const words is_special = (words)(magnitude >= 0x0f800000);
    return (floats)(choose(is_special, magnitude | 0x7f800000 | quiet, finite) | (bits & 0x8000) << 16);
}

/* Round to nearest, ties to even; what overflows becomes infinite, a NaN stays one and becomes quiet. */
INLINE halves to_float16(floats value)
{
    const words bits = (words)value, magnitude = bits & 0x7fffffff;
    const words normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const words subnormal = (words)((floats)magnitude + splat(0.5f)) - 0x3f000000; /* this addition rounds at 2^-24 */
    const words finite = choose((words)(magnitude < 0x38800000), subnormal, normal);
    const words nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
    const words infinite = (bits ^ bits) | 0x7c00;
    const words special = choose((words)(magnitude > 0x7f800000), nan, infinite);
    const words result = choose((words)(magnitude >= 0x477ff000), special, finite);
    return __builtin_convertvector(result | (bits >> 16 & 0x8000), halves);
}
#endif

/* STEP elements from an address. Those of bfloat16 come out even ones first: see in_order. */
INLINE step load_step(int type, const char *address)
{
    if (type == FLOAT32) {
        step value;
        memcpy(&value.low, address, sizeof value.low);
        memcpy(&value.high, address + sizeof value.low, sizeof value.high);
        return value;
    }
    if (type == BFLOAT16 || type == PAIRED) {
        words pairs;
        memcpy(&pairs, address, sizeof pairs);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        return (step){(floats)(pairs << 16), (floats)(pairs & 0xffff0000)};
#else
        return (step){(floats)(pairs & 0xffff0000), (floats)(pairs << 16)};
#endif
    }
    halves low, high;
    memcpy(&low, address, sizeof low);
    memcpy(&high, address + sizeof low, sizeof high);
    return (step){from_float16(low), from_float16(high)};
}

INLINE halves narrow(int type, floats value)
{
    return type == BFLOAT16 ? __builtin_convertvector(round_bfloat16(value) >> 16, halves) : to_float16(value);
}

INLINE words pair(step value)
{
    const words even = round_bfloat16(value.low), odd = round_bfloat16(value.high);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return even >> 16 | (odd & 0xffff0000);
#else
    return (even & 0xffff0000) | odd >> 16;
#endif
}

INLINE void store_step(int type, char *address, step value)
{
    if (type == FLOAT32) {
        memcpy(address, &value.low, sizeof value.low);
        memcpy(address + sizeof value.low, &value.high, sizeof value.high);
        return;
    }
    if (type == PAIRED) {
        const words pairs = pair(value);
        memcpy(address, &pairs, sizeof pairs);
        return;
    }
    const halves low = narrow(type, value.low), high = narrow(type, value.high);
    memcpy(address, &low, sizeof low);
    memcpy(address + sizeof low, &high, sizeof high);
}

/* As store_step, past the caches, for what is read again only much later: memory is written without being read first, and the
 * caches keep what is being read. The address is a multiple of 32. finish_streams before another thread may look. */
INLINE void stream_step(int type, char *address, step value)
{
#ifdef __AVX__
    if (type == FLOAT32) {
        _mm256_stream_ps((float *)address, (__m256)value.low);
        _mm256_stream_ps((float *)(address + sizeof value.low), (__m256)value.high);
        return;
    }
    if (type == PAIRED) {
        _mm256_stream_si256((__m256i *)address, (__m256i)pair(value));
        return;
    }
    const halves low = narrow(type, value.low), high = narrow(type, value.high);
    _mm_stream_si128((__m128i *)address, (__m128i)low);
    _mm_stream_si128((__m128i *)(address + sizeof low), (__m128i)high);
#else
    store_step(type, address, value);
#endif
}

INLINE void finish_streams(void)
{
#ifdef __AVX__
    _mm_sfence();
#endif
}

/* ``count`` elements from ``index`` on; zeros beyond. */
INLINE step load(int type, const char *from, int64_t index, int count)
{
    const char *address = from + index * size_of(type);
    if (count == STEP) return load_step(type, address);
    char copy[STEP * 4] = {0};
    memcpy(copy, address, (size_t)(count * size_of(type)));
    return load_step(type, copy);
}

INLINE void store(int type, char *to, int64_t index, int count, step value)
{
    char *address = to + index * size_of(type);
    if (count == STEP) {
        store_step(type, address, value);
        return;
    }
    char copy[STEP * 4];
    store_step(type, copy, value);
    memcpy(address, copy, (size_t)(count * size_of(type)));
}

/* Elements as they were loaded, in their order. Apart from load so that a sum of many loads is put in order once. */
INLINE step in_order(int type, step value)
{
    if (type != BFLOAT16) return value;
    return (step){(floats)SHUFFLE((words)value.low, (words)value.high, 0, 8, 1, 9, 2, 10, 3, 11),
                  (floats)SHUFFLE((words)value.low, (words)value.high, 4, 12, 5, 13, 6, 14, 7, 15)};
}

INLINE step load_scratch(const float *from, int64_t index) { return load_step(FLOAT32, (const char *)(from + index)); }

INLINE void store_scratch(float *to, int64_t index, step value) { store_step(FLOAT32, (char *)(to + index), value); }

/* The body sees ``index`` and ``count``: STEP elements at a time, then the rest of ``width``. */
#define FOR_STEPS(width, ...)                             \
    do {                                                  \
        int64_t index = 0;                                \
        for (; index + STEP <= (width); index += STEP) {  \
            enum { count = STEP };                        \
            __VA_ARGS__                                   \
        }                                                 \
        if (index < (width)) {                            \
            const int count = (int)((width) - index);     \
            __VA_ARGS__                                   \
        }                                                 \
    } while (0)

/* The call once for each element type, as a constant named TYPE. */
#define FOR_TYPE(type, call)             \
    do {                                 \
        if ((type) == FLOAT32) {         \
            enum { TYPE = FLOAT32 };     \
            call;                        \
        } else if ((type) == BFLOAT16) { \
            enum { TYPE = BFLOAT16 };    \
            call;                        \
        } else if ((type) == PAIRED) {   \
            enum { TYPE = PAIRED };      \
            call;                        \
        } else {                         \
            enum { TYPE = FLOAT16 };     \
            call;                        \
        }                                \
    } while (0)
