/* The mix of hidden states on a CPU: one pass over the states, sums in float32, conversions in registers.
 *
 * Compiled at first use (build.py) and called through ctypes (__init__.py); it knows neither Python nor torch.
 *
 * Work is cut into chunks of rows by the shape alone. Threads take runs of chunks, long ones first; a chunk's result depends on
 * nothing but its inputs, and sums over chunks are taken in their order once all are done.
 *
 * Shapes: B images, N patches (rows), D width, K weights, G groups, S slots. Strides of maps are in bytes, those of weights in
 * elements. The structs are mirrored in structs.py.
 */

#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "vectors.h"

#include "rows.h"
#include "threads.h"

enum { PLAIN = -1 };      /* the column of a term that has the constant weight 1 */
enum { LARGE = 4 << 20 }; /* bytes from which large pages are worth a call to the system */

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

/* Per group g: its members among the maps, their norm, and the slots and weight columns that use its mean. */
struct groups {
    int64_t count;
    const int64_t *member_start, *member;
    const struct norm *norm;
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

struct place {
    int64_t group, row;
};

/* The mean of a group's rows, each normalised if the group says so, to ``target``, which is ``mean`` if there are norms; ``mean``
 * and ``value`` have room for a row. What is at ``next`` (a group that does not exist: nothing) will be wanted after it. */
static void mean_row(const struct groups *groups, int64_t g, const struct map *maps, int type, int64_t image, int64_t row,
                     int64_t width, float *mean, float *value, struct target target, struct place next)
{
    const int64_t *member = groups->member + groups->member_start[g];
    const int64_t count = groups->member_start[g + 1] - groups->member_start[g];
    const float scale = (float)(1.0 / (double)count);
    if (groups->norm[g].kind == NO_NORM) {
        const char *from[count], *ahead[count];
        for (int64_t m = 0; m < count; m++) ahead[m] = from[m] = row_of(maps + member[m], image, row);
        if (next.group < groups->count) {
            const int64_t *later = groups->member + groups->member_start[next.group];
            const int64_t num_later = groups->member_start[next.group + 1] - groups->member_start[next.group];
            for (int64_t m = 0; m < count && m < num_later; m++) ahead[m] = row_of(maps + later[m], image, next.row);
        }
        sum_rows(type, from, ahead, count, width, mean, scale, target);
        return;
    }
    for (int64_t m = 0; m < count; m++) {
        FOR_TYPE(type, load_row(TYPE, row_of(maps + member[m], image, row), value, width));
        normalise_row(groups->norm[g], value, width);
        add_scaled(mean, value, 1.0f, width, m == 0);
    }
    add_scaled(mean, mean, scale, width, 1);
}

/* ---- forward ---------------------------------------------------------------------------------------------------------- */

struct forward {
    struct shape shape;
    struct groups groups;
    struct weights weights;
    int64_t in_type, copy_type, out_type, mean_type; /* of the members of groups, the copied sources, the outputs */
    int64_t num_slots, num_means;                    /* the means of the first num_means groups are kept */
    const int64_t *mixed_slot;                       /* per slot: 1 for a sum, 0 for a copy */
    const int64_t *copy_start, *copy_source, *copy_slot; /* copies to make after group g; at g = G those of no group */
    const struct map *sources;
    char *out;                                       /* (B, N, S*D) */
    char *means;                                     /* (num_means, B, N, D) */
    struct norm norm;                                /* over the S*D channels of a row of the output, or NO_NORM */
    const float *norm_weight, *norm_bias;            /* (S*D), or null */
    char *mixed;                                     /* the rows before that norm, as the output, or null */
    float *row_mean, *row_factor;                    /* (B, N), of each row, where ``mixed`` is kept */
};

/* The slots of row r of a chunk, which lie in ``sums`` (S, rows of the chunk), normalised together and stored. */
static void store_normalised(const struct forward *job, struct chunk chunk, int64_t r, const char *begun, float *sums)
{
    const int64_t width = job->shape.width, num_slots = job->num_slots, part = job->shape.rows_per_chunk * padded(width);
    const int64_t row = chunk.image * job->shape.rows + chunk.first_row + r, bytes = width * size_of((int)job->out_type);
    float *const first = sums + r * padded(width);
    float mean;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        float *values = first + slot * part;
        if (!begun[r * num_slots + slot]) memset(values, 0, (size_t)padded(width) * sizeof *values);
        for (int64_t i = width; i < padded(width); i++) values[i] = 0;
        if (job->mixed)
            FOR_TYPE(job->out_type, stream_row(TYPE, job->mixed + (row * num_slots + slot) * bytes, values, width));
    }
    const float factor = normalise_parts(job->norm, first, num_slots, part, width, &mean);
    if (job->row_mean) job->row_mean[row] = mean;
    if (job->row_factor) job->row_factor[row] = factor;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const float *weight = job->norm_weight ? job->norm_weight + slot * width : NULL;
        const float *bias = job->norm_bias ? job->norm_bias + slot * width : NULL;
        scale_and_shift(first + slot * part, weight, bias, width);
        FOR_TYPE(job->out_type, stream_row(TYPE, job->out + (row * num_slots + slot) * bytes, first + slot * part, width));
    }
}

static void forward_chunk(const struct forward *job, struct chunk chunk, float *scratch)
{
    const struct groups *groups = &job->groups;
    const int64_t width = job->shape.width, stride = padded(width), num_slots = job->num_slots, rows = job->shape.rows;
    const int64_t bytes = width * size_of((int)job->out_type), bytes_of_mean = width * size_of((int)job->mean_type);
    char *const out = job->out + (chunk.image * rows + chunk.first_row) * num_slots * bytes;
    float *const mean = scratch, *const value = scratch + stride, *const sums = scratch + 2 * stride; /* (S, rows of the chunk) */
    const int64_t columns = job->weights.indices ? job->weights.num_columns : 0;
    float factors[chunk.num_rows * columns + 1];
    char reached[chunk.num_rows * columns + 1];
    enum { BEGUN = 1, FINISHED };               /* in scratch, in the output */
    char begun[chunk.num_rows * num_slots + 1]; /* sums to which something has been added */
    struct row_weights weights[chunk.num_rows];
    const struct target stored = {mean, STORED, 1.0f, NULL};
    int64_t last[num_slots + 1]; /* the group whose mean is the last to be added to a slot */
    const int may_finish = job->norm.kind == NO_NORM && job->in_type == job->out_type && width % STEP == 0 && may_stream(out);
    memset(begun, 0, sizeof begun);
    for (int64_t g = 0; g < groups->count; g++)
        for (int64_t u = groups->use_start[g]; u < groups->use_start[g + 1]; u++) last[groups->use_slot[u]] = g;
    for (int64_t r = 0; r < chunk.num_rows; r++)
        weights[r] = weights_of_row(&job->weights, chunk.image, chunk.first_row + r, factors + r * columns, reached + r * columns);
    for (int64_t g = 0; g <= groups->count; g++) {
        for (int64_t r = 0; r < chunk.num_rows && g < groups->count; r++) {
            const int64_t row = chunk.first_row + r;
            if (g >= job->num_means && !reaches_any(weights[r], groups, g)) continue;
            const struct place next =
                r + 1 < chunk.num_rows ? (struct place){g, row + 1} : (struct place){g + 1, chunk.first_row};
            const int64_t first = groups->use_start[g], only = groups->use_start[g + 1] == first + 1;
            if (only && g >= job->num_means && groups->norm[g].kind == NO_NORM) {
                const int64_t slot = groups->use_slot[first];
                char *const has_begun = begun + r * num_slots + slot;
                const int finishes = may_finish && g == last[slot];
                const struct target sum = {sums + (slot * job->shape.rows_per_chunk + r) * stride, *has_begun ? ADDED : WEIGHTED,
                                           weight_of(weights[r], groups->use_column[first]),
                                           finishes ? out + (r * num_slots + slot) * bytes : NULL};
                mean_row(groups, g, job->sources, (int)job->in_type, chunk.image, row, width, mean, value, sum, next);
                *has_begun = finishes ? FINISHED : BEGUN;
                continue;
            }
            mean_row(groups, g, job->sources, (int)job->in_type, chunk.image, row, width, mean, value, stored, next);
            if (g < job->num_means) {
                char *to = job->means + ((g * job->shape.batch + chunk.image) * rows + row) * bytes_of_mean;
                FOR_TYPE(job->mean_type, stream_row(TYPE, to, mean, width));
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
            for (int64_t r = 0; r < chunk.num_rows; r++) {
                const char *from = row_of(job->sources + job->copy_source[c], chunk.image, chunk.first_row + r);
                const int64_t slot = job->copy_slot[c];
                if (job->norm.kind == NO_NORM) {
                    stream_copy(out + (r * num_slots + slot) * bytes, from, bytes);
                    continue;
                }
                FOR_TYPE(job->copy_type, load_row(TYPE, from, sums + (slot * job->shape.rows_per_chunk + r) * stride, width));
                begun[r * num_slots + slot] = 1;
            }
    }
    for (int64_t r = 0; r < chunk.num_rows && job->norm.kind != NO_NORM; r++) store_normalised(job, chunk, r, begun, sums);
    for (int64_t r = 0; r < chunk.num_rows && job->norm.kind == NO_NORM; r++)
        for (int64_t slot = 0; slot < num_slots; slot++) {
            char *to = out + (r * num_slots + slot) * bytes;
            const float *sum = sums + (slot * job->shape.rows_per_chunk + r) * stride;
            if (begun[r * num_slots + slot] == BEGUN)
                FOR_TYPE(job->out_type, stream_row(TYPE, to, sum, width));
            else if (job->mixed_slot[slot] && !begun[r * num_slots + slot])
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

/* Whether elements may stay as they are loaded: what is done with them is done to each alone. Worth 1.1 at B = 1. */
static int keeps_pairs(const struct forward *job)
{
    int alone = job->norm.kind == NO_NORM;
    for (int64_t g = 0; g < job->groups.count; g++) alone &= job->groups.norm[g].kind == NO_NORM;
    return alone && job->in_type == BFLOAT16 && job->out_type == BFLOAT16 && (job->num_means == 0 || job->mean_type == BFLOAT16);
}

/* Scratch: (2 + S * rows_per_chunk) padded rows a thread. */
void igva_forward(const struct forward *asked)
{
    struct forward job = *asked;
    const int64_t map = job.shape.batch * job.shape.rows * job.shape.width, out = map * size_of((int)job.out_type);
    advise_large_pages(job.out, out * job.num_slots);
    advise_large_pages(job.means, map * size_of((int)job.mean_type) * job.num_means);
    if (job.mixed) advise_large_pages(job.mixed, out * job.num_slots);
    if (keeps_pairs(&job)) job.in_type = job.out_type = job.mean_type = PAIRED;
    run_on(job.shape.threads, forward_work, &job);
}

/* ---- backward --------------------------------------------------------------------------------------------------------- */

/* Per gradient class c: its parts, each a sum of slots' cotangents by weight (or 1) times scale that goes back through a norm,
 * or through none. A class with norms is one source, and these are where they are taken. */
struct classes {
    int64_t count;
    const int64_t *part_start;
    const struct norm *norm;
    const int64_t *term_start, *term_slot, *term_column;
    const float *term_scale;
    const struct map *sources;
    int64_t source_type;
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
                             const float *cotangents, float *mean, float *value, double *products)
{
    const struct groups *groups = &job->groups;
    const int64_t width = job->shape.width, stride = padded(width);
    const struct target stored = {mean, STORED, 1.0f};
    for (int64_t g = 0; g < groups->count; g++) {
        const int64_t first = groups->member_start[g];
        const struct map *only = groups->member_start[g + 1] - first == 1 && groups->norm[g].kind == NO_NORM ? job->maps + groups->member[first] : NULL;
        if (!reaches_any(weights, groups, g)) continue;
        if (!only)
            mean_row(groups, g, job->maps, (int)job->map_type, image, row, width, mean, value, stored, (struct place){g + 1, row});
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

/* The sum of a part's terms, in their order; 0 if the row's weights reach none, and then nothing is written. */
static int sum_terms(const struct classes *classes, int64_t part, struct row_weights weights, const float *cotangents,
                     int64_t stride, float *sum)
{
    int begun = 0;
    for (int64_t t = classes->term_start[part]; t < classes->term_start[part + 1]; t++) {
        const int64_t column = classes->term_column[t];
        if (!reaches(weights, column)) continue;
        add_scaled(sum, cotangents + classes->term_slot[t] * stride, weight_of(weights, column) * classes->term_scale[t], stride,
                   !begun);
        begun = 1;
    }
    return begun;
}

/* The gradient of a row of class c; ``sum``, ``through_norm`` and ``value`` have room for a row each. */
static void class_gradient(const struct backward *job, int64_t c, int64_t image, int64_t row, struct row_weights weights,
                           const char *grad_out, const float *cotangents, float *sum, float *through_norm, float *value)
{
    const struct classes *classes = &job->classes;
    const int64_t width = job->shape.width, stride = padded(width), bytes = width * size_of((int)job->grad_type);
    const int64_t first_part = classes->part_start[c], last_part = classes->part_start[c + 1];
    const int64_t first = classes->term_start[first_part], last = classes->term_start[last_part];
    char *to = row_of(job->grads + c, image, row);
    int begun = 0;
    if (last_part - first_part == 1 && last - first == 1 && classes->norm[first_part].kind == NO_NORM &&
        classes->term_column[first] == PLAIN && classes->term_scale[first] == 1.0f) {
        stream_copy(to, grad_out + classes->term_slot[first] * job->slot_stride, bytes);
        return;
    }
    for (int64_t part = first_part; part < last_part; part++) {
        const struct norm norm = classes->norm[part];
        if (norm.kind == NO_NORM) { /* there is at most one such part, and it comes first */
            begun = sum_terms(classes, part, weights, cotangents, stride, sum);
        } else if (sum_terms(classes, part, weights, cotangents, stride, through_norm)) {
            FOR_TYPE(classes->source_type, load_row(TYPE, row_of(classes->sources + c, image, row), value, width));
            norm_gradient_row(norm, through_norm, value, width);
            add_scaled(sum, through_norm, 1.0f, stride, !begun);
            begun = 1;
        }
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
    float *const cotangents = scratch, *const sum = scratch + job->num_slots * stride;
    float *const through_norm = sum + stride, *const value = sum + 2 * stride;
    const char *grad_out = row_of(&job->grad_out, image, row);
    float factor[columns + 1];
    char reached[columns + 1];
    double products[columns + 1];
    const struct row_weights weights = weights_of_row(&job->weights, image, row, factor, reached);
    for (int64_t s = 0; s < job->num_slots; s++)
        if (job->needed[s])
            FOR_TYPE(job->grad_type, load_row(TYPE, grad_out + s * job->slot_stride, cotangents + s * stride, width));
    weight_gradients(job, image, row, weights, cotangents, sum, value, products);
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
        class_gradient(job, c, image, row, weights, grad_out, cotangents, sum, through_norm, value);
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

/* Scratch: (S + 3) padded rows a thread. */
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
