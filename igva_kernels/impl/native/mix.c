/* The mix of hidden states on a CPU: one pass over the states, sums in float32, conversions in registers.
 *
 * Compiled at first use (build.py) and called through ctypes (__init__.py); it knows neither Python nor torch. Portable C11 with
 * the vector extensions that gcc and clang share, so that one source serves every instruction set. Products and sums stay two
 * roundings (no contraction, no -ffast-math), so that a result depends neither on the machine nor on the number of threads.
 *
 * Work is cut into chunks of rows by the shape alone. Threads take runs of chunks, long ones first; a chunk's result depends on
 * nothing but its inputs, and sums over chunks are taken in their order once all are done.
 *
 * Shapes: B images, N patches (rows), D width, K weights, G groups, S slots. Strides of maps are in bytes, those of weights in
 * elements. The structs are mirrored in structs.py.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { LANES = 8, STEP = 2 * LANES, MAX_STREAMS = 8 };
enum { LARGE = 4 << 20 }; /* bytes from which large pages are worth a call to the system */
enum { PLAIN = -1 }; /* the column of a term that has the constant weight 1 */

typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

/* ---- STEP elements in registers --------------------------------------------------------------------------------------- */

typedef struct {
    floats low, high;
} step;

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

INLINE floats splat(float value) { return (floats){value, value, value, value, value, value, value, value}; }

INLINE words choose(words mask, words yes, words no) { return (mask & yes) | (~mask & no); }

INLINE step add(step a, step b) { return (step){a.low + b.low, a.high + b.high}; }

INLINE step multiply(step a, floats factor) { return (step){a.low * factor, a.high * factor}; }

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
    if (type == BFLOAT16) {
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

INLINE void store_step(int type, char *address, step value)
{
    if (type == FLOAT32) {
        memcpy(address, &value.low, sizeof value.low);
        memcpy(address + sizeof value.low, &value.high, sizeof value.high);
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
        } else {                         \
            enum { TYPE = FLOAT16 };     \
            call;                        \
        }                                \
    } while (0)

/* ---- one row ---------------------------------------------------------------------------------------------------------- */

/* Rows in scratch are padded to whole steps. */
INLINE int64_t padded(int64_t width) { return (width + STEP - 1) / STEP * STEP; }

INLINE void sum_streams(int type, int streams, const char *const *from, int64_t width, float *sum, int first, float scale)
{
    const char *stream[MAX_STREAMS];
    for (int s = 0; s < streams; s++) stream[s] = from[s];
    const floats factor = splat(scale);
    for (int64_t index = 0; index < width; index += STEP) {
        step total = load(type, stream[0], index, STEP);
        if (!first) total = add(load_scratch(sum, index), in_order(type, total)); /* that sum is in order, so all must be */
        for (int s = 1; s < streams; s++) {
            const step next = load(type, stream[s], index, STEP);
            total = add(total, first ? next : in_order(type, next));
        }
        if (first) total = in_order(type, total);
        store_scratch(sum, index, multiply(total, factor));
    }
}

/* sum = scale * ((sum if not first) + from[0] + from[1] + ...), added in this order; whole steps. */
static __attribute__((noinline)) void sum_steps(int type, int streams, const char *const *from, int64_t width, float *sum,
                                                int first, float scale)
{
#define SUM_STREAMS(n)                                                                           \
    case n:                                                                                      \
        if (first)                                                                               \
            FOR_TYPE(type, sum_streams(TYPE, n, from, width, sum, 1, scale));                    \
        else                                                                                     \
            FOR_TYPE(type, sum_streams(TYPE, n, from, width, sum, 0, scale));                    \
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

/* sum = scale * (from[0] + from[1] + ...), added in this order. */
static void sum_rows(int type, const char *const *from, int64_t streams, int64_t width, float *sum, float scale)
{
    const int64_t whole = width / STEP * STEP, rest = (width - whole) * size_of(type);
    int now = 0;
    for (int64_t done = 0; done < streams; done += now) {
        const int64_t left = streams - done;
        now = left >= MAX_STREAMS ? MAX_STREAMS : left >= 6 ? 6 : left == 5 ? 4 : (int)left;
        const float factor = now == left ? scale : 1.0f;
        sum_steps(type, now, from + done, whole, sum, done == 0, factor);
        if (rest) {
            char ends[MAX_STREAMS][STEP * 4] = {{0}};
            const char *end[MAX_STREAMS];
            for (int s = 0; s < now; s++) end[s] = memcpy(ends[s], from[done + s] + whole * size_of(type), (size_t)rest);
            sum_steps(type, now, end, STEP, sum + whole, done == 0, factor);
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

INLINE int may_stream(const char *to) { return (uintptr_t)to % sizeof(floats) == 0; }

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
        const step a = load_scratch(left, index), b = in_order(type, load(type, right, index, count));
        total = add(total, (step){a.low * b.low, a.high * b.high});
    });
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += (double)total.low[lane] + (double)total.high[lane];
    return sum;
}

/* ---- threads ---------------------------------------------------------------------------------------------------------- */

/* A pool that outlives the calls: waking a thread takes 5 microseconds, creating one 50 and a wait for a free core.
 * One caller at a time has it; another that comes meanwhile works alone, which is right as well, since the cores are taken.
 * A forked child has none of its parent's threads, so it starts with an empty pool. */

typedef void (*work)(void *job, int64_t worker);

struct pool {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake, idle;
    int64_t threads, openings, running, next_worker;
    work run;
    void *job;
};

#define EMPTY_POOL                                                                                                            \
    {                                                                                                                         \
        .caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,             \
        .idle = PTHREAD_COND_INITIALIZER                                                                                      \
    }

static struct pool pool = EMPTY_POOL;
static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

static void empty_pool(void)
{
    const struct pool empty = EMPTY_POOL;
    pool = empty;
}

static void install_fork_handler(void) { pthread_atfork(NULL, NULL, empty_pool); }

static void *serve(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.openings == 0) pthread_cond_wait(&pool.wake, &pool.lock);
        pool.openings--;
        pool.running++;
        const int64_t worker = pool.next_worker++;
        const work run = pool.run;
        void *const job = pool.job;
        pthread_mutex_unlock(&pool.lock);
        run(job, worker);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) pthread_cond_signal(&pool.idle);
    }
    return NULL;
}

/* Threads up to ``wanted``; fewer where the system gives no more. The lock is held. */
static void grow_pool(int64_t wanted)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    if (pool.threads >= wanted) return;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.threads < wanted && pthread_create(&thread, &attributes, serve, NULL) == 0) pool.threads++;
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Run the work on the caller's thread, as worker 0, and on up to ``threads`` - 1 others; return when all have finished. */
static void run_on(int64_t threads, work run, void *job)
{
    if (threads < 2) {
        run(job, 0);
        return;
    }
    pthread_once(&fork_handler, install_fork_handler);
    if (pthread_mutex_trylock(&pool.caller) != 0) {
        run(job, 0);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    grow_pool(threads - 1);
    pool.run = run;
    pool.job = job;
    pool.next_worker = 1;
    pool.openings = threads - 1 < pool.threads ? threads - 1 : pool.threads;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    run(job, 0);
    pthread_mutex_lock(&pool.lock);
    pool.openings = 0; /* whoever has not begun by now finds nothing left to do */
    while (pool.running > 0) pthread_cond_wait(&pool.idle, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.caller);
}

/* The next run of chunks for a thread: half of its share of what is left, so that the last ones are short. */
static int take(int64_t *next, int64_t total, int64_t threads, int64_t *begin, int64_t *end)
{
    int64_t at = __atomic_load_n(next, __ATOMIC_RELAXED);
    do {
        if (at >= total) return 0;
        const int64_t run = (total - at) / (2 * threads);
        *begin = at;
        *end = at + (run > 1 ? run : 1);
    } while (!__atomic_compare_exchange_n(next, &at, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return 1;
}

/* ---- fresh memory ----------------------------------------------------------------------------------------------------- */

/* The C library returns large blocks to the system when they are freed (glibc: all above 32 MiB, others from the heap's end), so
 * that outputs are often fresh memory, whose pages are faulted in and zeroed when they are first written. In pages of 4 KiB that
 * takes longer than the mix. Ask for large ones; this is advice, and may be ignored. */
static void advise_large_pages(char *data, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
    if (bytes >= LARGE) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

/* ---- what both directions share --------------------------------------------------------------------------------------- */

struct shape {
    int64_t batch, rows, width, rows_per_chunk; /* B, N, D */
    int64_t threads, next;                      /* chunks that are taken: 0 at first */
    float *scratch;                             /* one part a thread */
    int64_t scratch_size;                       /* floats of a part */
};

/* A map of (B, N, D), or one that is read as such: inner stride one element. */
struct map {
    char *data;
    int64_t image_stride, row_stride;
};

/* Per group g: its members among the maps, and the slots and weight columns that use its mean. */
struct groups {
    int64_t count;
    const int64_t *member_start, *member;
    const int64_t *use_start, *use_slot, *use_column;
};

/* Row n of image b has its weights at data + b * image_stride + n * row_stride: one for each of the K columns, or, where there
 * are indices, one for each of the num_named columns that these name at the same place. Named twice, a column gets the sum; an
 * index that is no column is padding. */
struct weights {
    const float *data;
    int64_t image_stride, row_stride;
    int64_t num_columns, num_named;
    const int64_t *indices;
};

struct chunk {
    int64_t image, first_row, num_rows;
};

INLINE int64_t chunks_of_image(const struct shape *shape)
{
    return (shape->rows + shape->rows_per_chunk - 1) / shape->rows_per_chunk;
}

INLINE struct chunk chunk_at(const struct shape *shape, int64_t number)
{
    const int64_t chunks = chunks_of_image(shape), first = number % chunks * shape->rows_per_chunk, left = shape->rows - first;
    return (struct chunk){number / chunks, first, left < shape->rows_per_chunk ? left : shape->rows_per_chunk};
}

INLINE char *row_of(const struct map *map, int64_t image, int64_t row)
{
    return map->data + image * map->image_stride + row * map->row_stride;
}

/* The weights of a row by column. What a row does not reach does not touch it, not even as 0 times infinity. */
struct row_weights {
    const float *factor;
    const char *reached; /* null: every column */
};

/* Where there are indices, the result lies in ``factor`` and ``reached``, with room for the K columns. */
static struct row_weights weights_of_row(const struct weights *weights, int64_t image, int64_t row, float *factor, char *reached)
{
    const int64_t at = image * weights->image_stride + row * weights->row_stride, count = weights->num_columns;
    if (!weights->indices) return (struct row_weights){weights->data ? weights->data + at : NULL, NULL};
    for (int64_t column = 0; column < count; column++) factor[column] = 0;
    memset(reached, 0, (size_t)count);
    for (int64_t n = 0; n < weights->num_named; n++) {
        const int64_t column = weights->indices[at + n];
        if (column < 0 || column >= count) continue;
        factor[column] += weights->data[at + n];
        reached[column] = 1;
    }
    return (struct row_weights){factor, reached};
}

INLINE int reaches(struct row_weights weights, int64_t column)
{
    return column == PLAIN || !weights.reached || weights.reached[column];
}

INLINE int reaches_any(struct row_weights weights, const struct groups *groups, int64_t g)
{
    for (int64_t u = groups->use_start[g]; u < groups->use_start[g + 1]; u++)
        if (reaches(weights, groups->use_column[u])) return 1;
    return 0;
}

INLINE float weight_of(struct row_weights weights, int64_t column) { return column == PLAIN ? 1.0f : weights.factor[column]; }

/* The mean of a group's rows, into scratch. */
static void mean_row(const struct groups *groups, int64_t g, const struct map *maps, int type, int64_t image, int64_t row,
                     int64_t width, float *mean)
{
    const int64_t *member = groups->member + groups->member_start[g];
    const int64_t count = groups->member_start[g + 1] - groups->member_start[g];
    const float scale = (float)(1.0 / (double)count);
    const char *from[count];
    for (int64_t m = 0; m < count; m++) from[m] = row_of(maps + member[m], image, row);
    sum_rows(type, from, count, width, mean, scale);
}

/* ---- forward ---------------------------------------------------------------------------------------------------------- */

struct forward {
    struct shape shape;
    struct groups groups;
    struct weights weights;
    int64_t in_type, out_type, num_slots, num_means; /* the means of the first num_means groups are kept */
    const int64_t *mixed_slot;                       /* per slot: 1 for a sum, 0 for a copy */
    const int64_t *copy_start, *copy_source, *copy_slot; /* copies to make after group g; at g = G those of no group */
    const struct map *sources;
    char *out;                                       /* (B, N, S*D) */
    char *means;                                     /* (num_means, B, N, D) */
};

static void forward_chunk(const struct forward *job, struct chunk chunk, float *scratch)
{
    const struct groups *groups = &job->groups;
    const int64_t width = job->shape.width, stride = padded(width), num_slots = job->num_slots, rows = job->shape.rows;
    const int64_t bytes = width * size_of((int)job->out_type);
    char *const out = job->out + (chunk.image * rows + chunk.first_row) * num_slots * bytes;
    float *const mean = scratch, *const sums = scratch + stride; /* (S, rows of the chunk) */
    const int64_t columns = job->weights.indices ? job->weights.num_columns : 0;
    float factors[chunk.num_rows * columns + 1];
    char reached[chunk.num_rows * columns + 1];
    char begun[chunk.num_rows * num_slots + 1]; /* sums to which something has been added */
    struct row_weights weights[chunk.num_rows];
    memset(begun, 0, sizeof begun);
    for (int64_t r = 0; r < chunk.num_rows; r++)
        weights[r] = weights_of_row(&job->weights, chunk.image, chunk.first_row + r, factors + r * columns, reached + r * columns);
    for (int64_t g = 0; g <= groups->count; g++) {
        for (int64_t r = 0; r < chunk.num_rows && g < groups->count; r++) {
            const int64_t row = chunk.first_row + r;
            if (g >= job->num_means && !reaches_any(weights[r], groups, g)) continue;
            mean_row(groups, g, job->sources, (int)job->in_type, chunk.image, row, width, mean);
            if (g < job->num_means) {
                char *to = job->means + ((g * job->shape.batch + chunk.image) * rows + row) * bytes;
                FOR_TYPE(job->out_type, stream_row(TYPE, to, mean, width));
            }
            for (int64_t u = groups->use_start[g]; u < groups->use_start[g + 1]; u++) {
                const int64_t column = groups->use_column[u], slot = groups->use_slot[u];
                char *const has_begun = begun + r * num_slots + slot;
                if (!reaches(weights[r], column)) continue;
                add_scaled(sums + (slot * job->shape.rows_per_chunk + r) * stride, mean, weight_of(weights[r], column), stride,
                           !*has_begun);
                *has_begun = 1;
            }
        }
        for (int64_t c = job->copy_start[g]; c < job->copy_start[g + 1]; c++) /* while the rows are in the cache */
            for (int64_t r = 0; r < chunk.num_rows; r++)
                memcpy(out + (r * num_slots + job->copy_slot[c]) * bytes,
                       row_of(job->sources + job->copy_source[c], chunk.image, chunk.first_row + r), (size_t)bytes);
    }
    for (int64_t r = 0; r < chunk.num_rows; r++)
        for (int64_t slot = 0; slot < num_slots; slot++) {
            char *to = out + (r * num_slots + slot) * bytes;
            const float *sum = sums + (slot * job->shape.rows_per_chunk + r) * stride;
            if (begun[r * num_slots + slot])
                FOR_TYPE(job->out_type, store_row(TYPE, to, sum, width));
            else if (job->mixed_slot[slot])
                memset(to, 0, (size_t)bytes);
        }
}

static void forward_work(void *argument, int64_t worker)
{
    struct forward *job = argument;
    struct shape *shape = &job->shape;
    int64_t begin, end;
    while (take(&shape->next, shape->batch * chunks_of_image(shape), shape->threads, &begin, &end))
        for (int64_t number = begin; number < end; number++)
            forward_chunk(job, chunk_at(shape, number), shape->scratch + worker * shape->scratch_size);
    finish_streams();
}

/* Scratch: (1 + S * rows_per_chunk) padded rows a thread. */
void igva_forward(struct forward *job)
{
    const int64_t map = job->shape.batch * job->shape.rows * job->shape.width * size_of((int)job->out_type);
    advise_large_pages(job->out, map * job->num_slots);
    advise_large_pages(job->means, map * job->num_means);
    run_on(job->shape.threads, forward_work, job);
}

/* ---- backward --------------------------------------------------------------------------------------------------------- */

/* Per gradient class c: the slots whose cotangents it sums, each by weight (or 1) times scale. */
struct classes {
    int64_t count;
    const int64_t *term_start, *term_slot, *term_column;
    const float *term_scale;
};

struct backward {
    struct shape shape;
    struct groups groups;     /* those whose weights need a gradient; none if no weight does */
    struct classes classes;   /* none if no state needs a gradient */
    struct weights weights;
    int64_t grad_type, map_type, num_slots;
    int64_t prefix;           /* rows before the patches, to be zeroed in every gradient */
    const int64_t *needed;    /* per slot: 1 if a group or a class reads its cotangent */
    struct map grad_out;      /* cotangent of slot 0 */
    int64_t slot_stride;      /* bytes from the cotangent of one slot to the next */
    const struct map *maps;   /* the members of the groups: the states, or the kept means */
    const struct map *grads;  /* one a class, at patch 0 */
    double *partials;         /* (chunks, K) sums of dL/dw over a chunk, or null */
    float *grad_weights;      /* in the places of the weights where each token has its own, else null */
};

/* The dot products of a row's cotangents with the group means: dL/dw by column. */
static void weight_gradients(const struct backward *job, int64_t image, int64_t row, struct row_weights weights,
                             const float *cotangents, float *mean, double *products)
{
    const struct groups *groups = &job->groups;
    const int64_t width = job->shape.width, stride = padded(width);
    for (int64_t g = 0; g < groups->count; g++) {
        const int64_t first = groups->member_start[g];
        const struct map *only = groups->member_start[g + 1] - first == 1 ? job->maps + groups->member[first] : NULL;
        if (!reaches_any(weights, groups, g)) continue;
        if (!only) mean_row(groups, g, job->maps, (int)job->map_type, image, row, width, mean);
        for (int64_t u = groups->use_start[g]; u < groups->use_start[g + 1]; u++) {
            const float *cotangent = cotangents + groups->use_slot[u] * stride;
            double *product = products + groups->use_column[u];
            if (!reaches(weights, groups->use_column[u])) continue;
            if (only)
                FOR_TYPE(job->map_type, *product = dot_row(TYPE, cotangent, row_of(only, image, row), width));
            else
                *product = dot_row(FLOAT32, cotangent, (const char *)mean, width);
        }
    }
}

/* The gradient of a row of class c: its terms, in their order. */
static void class_gradient(const struct backward *job, int64_t c, struct row_weights weights, const char *grad_out,
                           const float *cotangents, float *sum, char *to)
{
    const struct classes *classes = &job->classes;
    const int64_t width = job->shape.width, stride = padded(width), bytes = width * size_of((int)job->grad_type);
    const int64_t first = classes->term_start[c], last = classes->term_start[c + 1];
    int begun = 0;
    if (last - first == 1 && classes->term_column[first] == PLAIN && classes->term_scale[first] == 1.0f) {
        stream_copy(to, grad_out + classes->term_slot[first] * job->slot_stride, bytes);
        return;
    }
    for (int64_t t = first; t < last; t++) {
        const int64_t column = classes->term_column[t];
        if (!reaches(weights, column)) continue;
        add_scaled(sum, cotangents + classes->term_slot[t] * stride, weight_of(weights, column) * classes->term_scale[t], stride,
                   !begun);
        begun = 1;
    }
    if (begun)
        FOR_TYPE(job->grad_type, stream_row(TYPE, to, sum, width));
    else
        memset(to, 0, (size_t)bytes);
}

static void backward_row(const struct backward *job, int64_t image, int64_t row, double *partials, float *scratch)
{
    const int64_t width = job->shape.width, stride = padded(width), columns = job->weights.num_columns;
    const int64_t at = image * job->weights.image_stride + row * job->weights.row_stride;
    float *const cotangents = scratch, *const total = scratch + job->num_slots * stride;
    const char *grad_out = row_of(&job->grad_out, image, row);
    float factor[columns + 1];
    char reached[columns + 1];
    double products[columns + 1];
    const struct row_weights weights = weights_of_row(&job->weights, image, row, factor, reached);
    for (int64_t s = 0; s < job->num_slots; s++)
        if (job->needed[s])
            FOR_TYPE(job->grad_type, load_row(TYPE, grad_out + s * job->slot_stride, cotangents + s * stride, width));
    weight_gradients(job, image, row, weights, cotangents, total, products);
    for (int64_t column = 0; column < columns && job->partials; column++) partials[column] += products[column];
    if (job->grad_weights && job->weights.indices)
        for (int64_t n = 0; n < job->weights.num_named; n++) {
            const int64_t column = job->weights.indices[at + n];
            job->grad_weights[at + n] = column < 0 || column >= columns ? 0.0f : (float)products[column];
        }
    else
        for (int64_t column = 0; column < columns && job->grad_weights; column++)
            job->grad_weights[at + column] = (float)products[column];
    for (int64_t c = 0; c < job->classes.count; c++)
        class_gradient(job, c, weights, grad_out, cotangents, total, row_of(job->grads + c, image, row));
}

static void backward_chunk(const struct backward *job, int64_t number, float *scratch)
{
    const struct chunk chunk = chunk_at(&job->shape, number);
    const int64_t bytes = job->shape.width * size_of((int)job->grad_type);
    double partials[job->weights.num_columns + 1];
    memset(partials, 0, sizeof partials);
    for (int64_t c = 0; c < job->classes.count && chunk.first_row == 0; c++)
        for (int64_t row = -job->prefix; row < 0; row++) memset(row_of(job->grads + c, chunk.image, row), 0, (size_t)bytes);
    for (int64_t r = 0; r < chunk.num_rows; r++) backward_row(job, chunk.image, chunk.first_row + r, partials, scratch);
    if (job->partials)
        memcpy(job->partials + number * job->weights.num_columns, partials,
               (size_t)job->weights.num_columns * sizeof *partials);
}

static void backward_work(void *argument, int64_t worker)
{
    struct backward *job = argument;
    struct shape *shape = &job->shape;
    int64_t begin, end;
    while (take(&shape->next, shape->batch * chunks_of_image(shape), shape->threads, &begin, &end))
        for (int64_t number = begin; number < end; number++)
            backward_chunk(job, number, shape->scratch + worker * shape->scratch_size);
    finish_streams();
}

/* Scratch: (S + 1) padded rows a thread. */
void igva_backward(struct backward *job)
{
    const int64_t rows = job->shape.batch * (job->shape.rows + job->prefix);
    for (int64_t c = 0; c < job->classes.count; c++)
        advise_large_pages(row_of(job->grads + c, 0, -job->prefix), rows * job->shape.width * size_of((int)job->grad_type));
    run_on(job->shape.threads, backward_work, job);
}

/* sums[b, k] = the partial sums of image b's chunks, in their order; b = 0 alone, over all images, if ``shared``. */
void igva_sum_partials(const double *partials, int64_t batch, int64_t chunks, int64_t num_weights, int64_t shared, float *sums)
{
    for (int64_t b = 0; b < (shared ? 1 : batch); b++)
        for (int64_t k = 0; k < num_weights; k++) {
            double sum = 0;
            const int64_t begin = shared ? 0 : b * chunks, end = shared ? batch * chunks : (b + 1) * chunks;
            for (int64_t c = begin; c < end; c++) sum += partials[c * num_weights + k];
            sums[b * num_weights + k] = (float)sum;
        }
}

/* What the other side of the call believes these structs to be; see structs.py. */
int64_t igva_size_of_forward(void) { return (int64_t)sizeof(struct forward); }
int64_t igva_size_of_backward(void) { return (int64_t)sizeof(struct backward); }
