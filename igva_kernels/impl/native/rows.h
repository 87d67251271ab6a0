/* What is done with one row of D channels. Rows in scratch are float32, padded to whole steps. */

#include <math.h>

enum { MAX_STREAMS = 8, CACHE_LINE = 64 };

INLINE int64_t padded(int64_t width) { return (width + STEP - 1) / STEP * STEP; }

INLINE int may_stream(const char *to) { return (uintptr_t)to % sizeof(floats) == 0; }

/* Where a sum of rows goes, in scratch: as it is, times a weight, or times a weight onto what is there; or, where ``out`` is not
 * null, what would come to lie there goes past the caches to the output instead, whose elements are of the type of the rows. */
enum { STORED, WEIGHTED, ADDED };

struct target {
    float *row;
    int how;
    float weight;
    char *out;
};

INLINE void sum_streams(int type, int streams, const char *const *from, const char *const *next, int64_t width, const float *begun,
                        float scale, struct target target)
{
    const char *stream[MAX_STREAMS], *ahead[MAX_STREAMS];
    for (int s = 0; s < streams; s++) stream[s] = from[s], ahead[s] = next[s];
    const floats factor = splat(scale), weight = splat(target.weight);
    for (int64_t index = 0; index < width; index += STEP) {
        if (index * size_of(type) % CACHE_LINE == 0)
            for (int s = 0; s < streams; s++) __builtin_prefetch(ahead[s] + index * size_of(type));
        step total = load(type, stream[0], index, STEP);
        if (begun) total = add(load_scratch(begun, index), in_order(type, total)); /* that sum is in order, so all must be */
        for (int s = 1; s < streams; s++) {
            const step next = load(type, stream[s], index, STEP);
            total = add(total, begun ? in_order(type, next) : next);
        }
        if (!begun) total = in_order(type, total);
        total = multiply(total, factor);
        if (target.how != STORED) total = multiply(total, weight);
        if (target.how == ADDED) total = add(load_scratch(target.row, index), total);
        if (target.out)
            stream_step(type, target.out + index * size_of(type), total);
        else
            store_scratch(target.row, index, total);
    }
}

/* target = scale * (begun + from[0] + from[1] + ...), added in this order, where begun may be null; whole steps. */
static __attribute__((noinline)) void sum_steps(int type, int streams, const char *const *from, const char *const *next,
                                                int64_t width, const float *begun, float scale, struct target target)
{
#define SUM_STREAMS(n)                                                                            \
    case n:                                                                                       \
        if (begun)                                                                                \
            FOR_TYPE(type, sum_streams(TYPE, n, from, next, width, begun, scale, target));        \
        else                                                                                      \
            FOR_TYPE(type, sum_streams(TYPE, n, from, next, width, NULL, scale, target));         \
        break;
    switch (streams) {
        SUM_STREAMS(1)
        SUM_STREAMS(2)
        SUM_STREAMS(3)
        SUM_STREAMS(4)
        SUM_STREAMS(6)
        SUM_STREAMS(MAX_STREAMS)
    }
#undef SUM_STREAMS
}

/* target = scale * (from[0] + from[1] + ...), added in this order; ``sum`` has room for a row. Rows of ``next`` come after these,
 * one a stream: a row is about a page, and the processor's own prefetchers begin anew with each: asking for the next ones is worth
 * 1.2 to 1.5 times where the maps are larger than the caches (two cores, AVX2, B = 4), and nothing at B = 1. That a weighted sum
 * takes the mean from the registers, and not from scratch, is worth 1.3 times in float32 and 1.6 in bfloat16 at B = 4, and
 * 1.1 at B = 1. That the last mean goes straight to the output is worth 1.05 at B = 1, and nothing at B = 4. */
static void sum_rows(int type, const char *const *from, const char *const *next, int64_t streams, int64_t width, float *sum,
                     float scale, struct target target)
{
    const int64_t whole = width / STEP * STEP, rest = (width - whole) * size_of(type);
    int now = 0;
    for (int64_t done = 0; done < streams; done += now) {
        const int64_t left = streams - done;
        now = left >= MAX_STREAMS ? MAX_STREAMS : left >= 6 ? 6 : left == 5 ? 4 : (int)left;
        const float factor = now == left ? scale : 1.0f;
        struct target to = now == left ? target : (struct target){sum, STORED, 1.0f, NULL};
        sum_steps(type, now, from + done, next + done, whole, done ? sum : NULL, factor, to);
        if (rest) {
            char ends[MAX_STREAMS][STEP * 4] = {{0}};
            const char *end[MAX_STREAMS];
            for (int s = 0; s < now; s++) end[s] = memcpy(ends[s], from[done + s] + whole * size_of(type), (size_t)rest);
            to.row += whole;
            sum_steps(type, now, end, end, STEP, done ? sum + whole : NULL, factor, to);
        }
    }
}

/* target = value * factor, or target += value * factor, in scratch. */
static void add_scaled(float *target, const float *value, float factor, int64_t width, int first)
{
    const floats factors = splat(factor);
    if (first)
        for (int64_t i = 0; i < width; i += STEP) store_scratch(target, i, multiply(load_scratch(value, i), factors));
    else
        for (int64_t i = 0; i < width; i += STEP)
            store_scratch(target, i, add(load_scratch(target, i), multiply(load_scratch(value, i), factors)));
}

INLINE void load_row(int type, const char *from, float *to, int64_t width)
{
    FOR_STEPS(width, { store_scratch(to, index, in_order(type, load(type, from, index, count))); });
}

INLINE void store_row(int type, char *to, const float *from, int64_t width)
{
    FOR_STEPS(width, { store(type, to, index, count, load_scratch(from, index)); });
}

INLINE void stream_row(int type, char *to, const float *from, int64_t width)
{
    const int64_t whole = may_stream(to) ? width / STEP * STEP : 0;
    for (int64_t i = 0; i < whole; i += STEP) stream_step(type, to + i * size_of(type), load_scratch(from, i));
    store_row(type, to + whole * size_of(type), from + whole, width - whole);
}

/* A row as it is, bit for bit. */
static void stream_copy(char *to, const char *from, int64_t bytes)
{
    const int64_t size = sizeof(step), whole = may_stream(to) ? bytes / size * size : 0;
    for (int64_t i = 0; i < whole; i += size) stream_step(FLOAT32, to + i, load_step(FLOAT32, from + i));
    memcpy(to + whole, from + whole, (size_t)(bytes - whole));
}

/* The dot product of a row in scratch with a row of a map, in lanes whose number and order are fixed. */
INLINE double dot_row(int type, const float *left, const char *right, int64_t width)
{
    step total = {{0}, {0}};
    FOR_STEPS(width, {
        __builtin_prefetch(right + (width + index) * size_of(type)); /* the row after it: few streams leave the prefetchers idle */
        const step a = load_scratch(left, index), b = in_order(type, load(type, right, index, count));
        total = add(total, multiply_steps(a, b));
    });
    return sum_lanes(total);
}

/* The sum of a row in scratch, or of its products with another, in lanes whose number and order are fixed. */
INLINE double sum_row(const float *row, const float *other, int64_t width)
{
    step total = {{0}, {0}};
    for (int64_t i = 0; i < width; i += STEP) {
        step value = load_scratch(row, i);
        if (other) value = multiply_steps(value, load_scratch(other, i));
        total = add(total, value);
    }
    return sum_lanes(total);
}

/* ---- norms without parameters over the channels of a row -------------------------------------------------------------- */

enum { NO_NORM = 0, LAYER_NORM = 1, RMS_NORM = 2 };

struct norm {
    int64_t kind;
    double eps;
};

/* A row in scratch, normalised where it lies; returns the factor, 1 / sqrt(variance + eps). Its padding becomes zero. */
static float normalise_row(struct norm norm, float *row, int64_t width)
{
    for (int64_t i = width; i < padded(width); i++) row[i] = 0;
    if (norm.kind == LAYER_NORM) {
        const floats mean = splat((float)(sum_row(row, NULL, width) / (double)width));
        for (int64_t i = 0; i < width; i += STEP) {
            const step value = load_scratch(row, i);
            store_scratch(row, i, (step){value.low - mean, value.high - mean});
        }
        for (int64_t i = width; i < padded(width); i++) row[i] = 0;
    }
    const double squares = sum_row(row, row, width);
    const float factor = (float)(1.0 / sqrt(squares / (double)width + norm.eps));
    add_scaled(row, row, factor, width, 1);
    return factor;
}

/* A norm over ``parts`` rows of ``width`` channels that lie ``stride`` apart in scratch, as if they were one row; their padding is
 * zero. ``mean`` gets the mean (0 for RMS_NORM), and the factor 1 / sqrt(variance + eps) is returned. */
static float normalise_parts(struct norm norm, float *rows, int64_t parts, int64_t stride, int64_t width, float *mean)
{
    const double count = (double)(parts * width);
    double sum = 0, squares = 0;
    for (int64_t part = 0; part < parts && norm.kind == LAYER_NORM; part++) sum += sum_row(rows + part * stride, NULL, width);
    *mean = (float)(sum / count);
    for (int64_t part = 0; part < parts; part++) {
        float *row = rows + part * stride;
        const floats shift = splat(*mean);
        for (int64_t i = 0; i < width && norm.kind == LAYER_NORM; i += STEP) {
            const step value = load_scratch(row, i);
            store_scratch(row, i, (step){value.low - shift, value.high - shift});
        }
        for (int64_t i = width; i < padded(width); i++) row[i] = 0;
        squares += sum_row(row, row, width);
    }
    const float factor = (float)(1.0 / sqrt(squares / count + norm.eps));
    for (int64_t part = 0; part < parts; part++) add_scaled(rows + part * stride, rows + part * stride, factor, width, 1);
    return factor;
}

/* row = row * weight + bias, either of which may be null; these are not padded. */
static void scale_and_shift(float *row, const float *weight, const float *bias, int64_t width)
{
    FOR_STEPS(width, {
        step value = load_scratch(row, index);
        if (weight) value = multiply_steps(value, load(FLOAT32, (const char *)weight, index, count));
        if (bias) value = add(value, load(FLOAT32, (const char *)bias, index, count));
        store_scratch(row, index, value);
    });
}

/* The vector-Jacobian product of a norm: ``grad`` becomes the gradient of ``value``, which becomes normalised. */
static void norm_gradient_row(struct norm norm, float *grad, float *value, int64_t width)
{
    const floats factor = splat(normalise_row(norm, value, width));
    const floats slope = splat((float)(sum_row(grad, value, width) / (double)width));
    const floats mean = splat(norm.kind == LAYER_NORM ? (float)(sum_row(grad, NULL, width) / (double)width) : 0.0f);
    for (int64_t i = 0; i < width; i += STEP) {
        const step g = load_scratch(grad, i), v = load_scratch(value, i);
        store_scratch(grad, i, (step){(g.low - v.low * slope - mean) * factor, (g.high - v.high * slope - mean) * factor});
    }
    for (int64_t i = width; i < padded(width); i++) grad[i] = 0;
}
