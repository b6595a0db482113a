// Attention of sequences with one query each. Long ones are cut into pieces of positions, which are weighed by themselves and then brought
// together (as "Flash-Decoding for long-context inference", Dao, Haziza, Massa and Sizov, 2023): one sequence keeps all threads busy.

#pragma once

#include "attention.h"
#include "threads.h"

namespace {

constexpr int KEYS = 4;   // at once
constexpr int HEADS = 3;  // query heads at once: with as many keys, their sums and what they are made of fill 16 registers

constexpr int64_t PIECE = 512;   // positions that are summed up by themselves: their keys and values stay in the cache for all heads
constexpr int64_t FETCHED = 16;  // positions between what is computed with and what is fetched: their rows lie apart from each other

template <typename T>
inline void fetch(const T* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
}

// Numbers in the order in which load_two gives those of a row of T.
template <typename T>
inline void reorder(const T* from, float factor, int64_t dim, float* to) {
    constexpr int64_t TWO = 2 * LANES;
    int64_t d = 0;
    for (; is_bfloat16(from) && d + TWO <= dim; d += TWO)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            to[d + lane] = widen(from[d + 2 * lane]) * factor;
            to[d + LANES + lane] = widen(from[d + 2 * lane + 1]) * factor;
        }
    for (; d < dim; ++d) to[d] = widen(from[d]) * factor;
}

// The same pointer, of which the compiler does not know that: what it loads through it, it loads again, and registers are left for sums.
template <typename P>
inline P* anew(P* pointer) {
    asm volatile("" : "+r"(pointer));
    return pointer;
}

// Products of H reordered queries with KEYS keys, to scores[h * stride + key]. Never inlined: among other code the compiler runs out of registers.
template <int H, typename T>
__attribute__((noinline)) void score(const T* const* keys, const float* query, int64_t dim, float* scores, int64_t stride) {
    Vector sums[KEYS][H];
    for (int j = 0; j < KEYS; ++j)
        for (int h = 0; h < H; ++h) sums[j][h] = splat(0.0f);
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES)
        for (int j = 0; j < KEYS; ++j) {
            Vector first, second;
            load_two(keys[j] + d, first, second);
            for (int h = 0; h < H; ++h) {
                sums[j][h] = fma(first, load(query + h * dim + d), sums[j][h]);
                sums[j][h] = fma(second, load(query + h * dim + d + LANES), sums[j][h]);
            }
        }
    for (int h = 0; h < H; ++h) sum_four(sums[0][h], sums[1][h], sums[2][h], sums[3][h], scores + h * stride);
    for (; d < dim; ++d)
        for (int h = 0; h < H; ++h)
            for (int j = 0; j < KEYS; ++j) scores[h * stride + j] += query[h * dim + d] * widen(keys[j][d]);
}

// Weighted sums of rows of MIXED values for H heads: weights[h * stride + position], to out[h * out_stride].
constexpr int64_t MIXED = 4 * LANES;
template <int H, typename T>
__attribute__((noinline)) void mix(const T* values, int64_t value_stride, const int64_t* slots, int64_t length, const float* weights,
                                   int64_t stride, float* out, int64_t out_stride) {
    Vector sums[H][4];
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < 4; ++v) sums[h][v] = splat(0.0f);
    for (int64_t i = 0; i < length; ++i) {
        const T* row = values + slots[i] * value_stride;
        __builtin_prefetch(values + slots[std::min(i + FETCHED, length - 1)] * value_stride);
        for (int half = 0; half < 2; ++half) {
            Vector first, second;
            load_two(row + half * 2 * LANES, first, second);
            const float* const own = anew(weights);
            for (int h = 0; h < H; ++h) {
                const Vector weight = splat(own[h * stride + i]);
                sums[h][2 * half] = fma(weight, first, sums[h][2 * half]);
                sums[h][2 * half + 1] = fma(weight, second, sums[h][2 * half + 1]);
            }
        }
    }
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < 4; ++v) put(sums[h][v], out + h * out_stride + v * LANES);
}

// f(number of heads that the compiler knows, KV head, query head) for query heads of KV heads [from, to), some that share one at a time.
template <typename F>
inline void each_heads(const Shape& shape, int64_t from, int64_t to, F f) {
    for (int64_t kv = from; kv < to; ++kv)
        for (int64_t h = 0; h < shape.group; h += HEADS) {
            const int64_t head = kv * shape.group + h;
            switch (std::min<int64_t>(HEADS, shape.group - h)) {
                case 1: f(std::integral_constant<int, 1>(), kv, head); break;
                case 2: f(std::integral_constant<int, 2>(), kv, head); break;
                default: f(std::integral_constant<int, 3>(), kv, head);
            }
        }
}

// What one query makes of some positions: for each head, the largest score, the sum of all weights relative to it, and the values' sums,
// in the order in which load_two gives those of a row of T, not yet divided.
struct Partial {
    float *largest, *total, *sums;
    Partial(float* place, int64_t heads) : largest(place), total(place + heads), sums(place + 2 * heads) {}
    static int64_t size(const Shape& shape) { return shape.kv_heads * shape.group * (2 + shape.value_dim); }
};

// Values in the order of load_two, to a row of T.
template <typename T>
inline void store_reordered(const float* from, float factor, int64_t dim, T* to) {
    const int64_t whole = dim / MIXED * MIXED, step = is_bfloat16(to) ? 2 : 1, second = is_bfloat16(to) ? 1 : LANES;
    for (int64_t d = 0; d < whole; d += 2 * LANES) {
        float in_order[2 * LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) {
            in_order[step * lane] = from[d + lane] * factor;
            in_order[step * lane + second] = from[d + LANES + lane] * factor;
        }
        for (int64_t i = 0; i < 2 * LANES; ++i) store(in_order[i], to + d + i);
    }
    for (int64_t d = whole; d < dim; ++d) store(from[d] * factor, to + d);
}

// Scores of some query heads become weights, relative to the largest of each, which is told with their sum.
inline void weigh_partly(const Shape& shape, const Extras& extras, int heads, float* scores, int64_t length, int64_t stride, int64_t distance,
                         float* largest, float* total) {
    for (int h = 0; h < heads; ++h) {
        float* const row = scores + h * stride;
        adjust(shape, extras.of(shape, h), row, length, distance);
        std::fill(row + length, row + stride, -INFINITY);
        largest[h] = largest_of(row, stride);
        const float zero = largest[h] == -INFINITY ? 0.0f : largest[h];
        for (int64_t i = 0; i < stride; ++i) row[i] = exponential_below_one(row[i] - zero);
        total[h] = sum_of(row, stride);
    }
}

// Positions [first, last] of one sequence and KV heads [from, to): what the query at position `own` makes of them.
template <typename T>
void decode(const Shape& shape, const T* query, const T* keys, const T* values, const int32_t* table, int64_t first, int64_t last,
            int64_t own, int64_t from, int64_t to, const Extras& extras, const Partial& partial) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int64_t> slots;
    const int64_t dim = shape.key_dim, value_dim = shape.value_dim, length = last - first + 1;
    const int64_t stride = (length + KEYS + ROW_LANES - 1) / ROW_LANES * ROW_LANES;  // room for whole vectors
    float *const scores = at_line(scratch, HEADS * (dim + stride)), *const wide = scores + HEADS * stride;
    slots.resize(length);
    find_slots(shape, table, first, last, slots.data());
    each_heads(shape, from, to, [&](auto some, int64_t kv, int64_t head) {
        const T *const own_keys = keys + kv * dim, *const own_values = values + kv * value_dim;
        for (int h = 0; h < some; ++h) reorder(query + (head + h) * dim, shape.scale, dim, wide + h * dim);
        for (int64_t i = 0; i < length; i += KEYS) {
            const T* rows[KEYS];
            for (int j = 0; j < KEYS; ++j) {
                rows[j] = own_keys + slots[std::min(i + j, length - 1)] * shape.key_stride;
                const int64_t ahead = i + j + FETCHED;
                if (ahead < length) fetch(own_keys + slots[ahead] * shape.key_stride, dim);
                else if (ahead - length < length) fetch(own_values + slots[ahead - length] * shape.value_stride, value_dim);
            }
            score<some>(rows, wide, dim, scores + i, stride);
        }
        weigh_partly(shape, extras.of(shape, head), some, scores, length, stride, own - first, partial.largest + head, partial.total + head);
        float* const sums = partial.sums + head * value_dim;
        int64_t d = 0;
        for (; d + MIXED <= value_dim; d += MIXED)
            mix<some>(own_values + d, shape.value_stride, slots.data(), length, scores, stride, sums + d, value_dim);
        for (; d < value_dim; ++d)
            for (int h = 0; h < some; ++h) {
                float sum = 0.0f;
                for (int64_t i = 0; i < length; ++i) sum += scores[h * stride + i] * widen(own_values[slots[i] * shape.value_stride + d]);
                sums[h * value_dim + d] = sum;
            }
    });
}

// Brings `count` partial results of one query together, for heads [from, to).
template <typename T>
void finish(const Shape& shape, const Extras& extras, float* partials, int64_t count, int64_t from, int64_t to, T* output) {
    const int64_t heads = shape.kv_heads * shape.group, dim = shape.value_dim, size = Partial::size(shape);
    Partial all(partials, heads);
    for (int64_t h = from; h < to; ++h) {
        float largest = extras.sinks ? extras.sinks[h] : -INFINITY;
        for (int64_t p = 0; p < count; ++p) largest = std::max(largest, Partial(partials + p * size, heads).largest[h]);
        float total = extras.sinks ? exponential(extras.sinks[h] - largest) : 0.0f;
        float* const sums = all.sums + h * dim;
        for (int64_t p = 0; p < count; ++p) {
            const Partial part(partials + p * size, heads);
            const float factor = part.largest[h] == largest ? 1.0f : exponential(part.largest[h] - largest);
            total += part.total[h] * factor;
            for (int64_t d = 0; d < dim; ++d) sums[d] = (p > 0 ? sums[d] : 0.0f) + part.sums[h * dim + d] * factor;
        }
        store_reordered(sums, 1.0f / total, dim, output + h * dim);
    }
}

// Some positions of one sequence: `piece` of `count`, one after another.
struct Piece {
    int64_t sequence, piece, count;
};

// The sequences of a step with one query each. Returns whether there are others.
template <typename T>
bool attend_decodes(const Shape& shape, const Sequences& step, const T* query, const T* keys, const T* values, const Extras& extras, T* output) {
    thread_local std::vector<Piece> all_pieces;
    thread_local std::vector<float> all_partials;
    bool has_others = false, has_parts = false;
    all_pieces.clear();
    for (int64_t s = 0; s < step.count; ++s) {
        const int64_t token = step.starts[s];
        if (step.starts[s + 1] - token != 1) {
            has_others = true;
            continue;
        }
        const int64_t count = (step.last[token] - step.first[token]) / PIECE + 1;
        has_parts |= count > 1;
        for (int64_t piece = 0; piece < count; ++piece) all_pieces.push_back({s, piece, count});
    }
    const int64_t heads = shape.kv_heads * shape.group, size = Partial::size(shape), num_pieces = all_pieces.size();
    if (num_pieces == 0) return has_others;
    all_partials.resize(num_pieces * size);
    const Piece* const pieces = all_pieces.data();
    float* const partials = all_partials.data();
    const int64_t wanted = own_team() ? 2 * own_team()->threads() : 1;  // tasks
    const int64_t splits = std::min((wanted + num_pieces - 1) / num_pieces, shape.kv_heads);
    share(num_pieces * splits, true, [&](int64_t i) {
        const Piece& own = pieces[i / splits];
        const int64_t token = step.starts[own.sequence], last = step.last[token], first = step.first[token] + own.piece * PIECE;
        const int64_t from = i % splits * shape.kv_heads / splits, to = (i % splits + 1) * shape.kv_heads / splits;
        Partial partial(partials + i / splits * size, heads);
        decode(shape, query + token * heads * shape.key_dim, keys, values, step.tables + own.sequence * step.table_stride, first,
               std::min(first + PIECE - 1, last), last, from, to, extras, partial);
        if (own.count == 1)
            finish(shape, extras, partials + i / splits * size, 1, from * shape.group, to * shape.group, output + token * heads * shape.value_dim);
    }, UNEVEN_PIECES);
    if (has_parts)
        share(num_pieces, true, [&](int64_t i) {
            const Piece& own = pieces[i];
            if (own.piece == 0 && own.count > 1)
                finish(shape, extras, partials + i * size, own.count, 0, heads, output + step.starts[own.sequence] * heads * shape.value_dim);
        });
    return has_others;
}

}  // namespace
