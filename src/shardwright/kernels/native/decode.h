// Attention of sequences with one query each. Long ones are cut into pieces of positions, which are weighed by themselves and then brought
// together (as "Flash-Decoding for long-context inference", Dao, Haziza, Massa and Sizov, 2023): one sequence keeps all threads busy.

#pragma once

#include "attention.h"
#include "threads.h"

namespace shardwright {
namespace {

constexpr int KEYS = 4;   // at once
constexpr int HEADS = 3;  // query heads at once: with as many keys, their sums and what they are made of fill 16 registers

constexpr int64_t PIECE = 512;        // positions that are summed up by themselves
constexpr int64_t AT_ONCE = 16;       // positions whose values are summed up for one head after another: the nearest cache holds them
constexpr int64_t FETCHED = 6 << 10;  // bytes of keys between those that are computed with and those that are fetched

template <typename T>
inline void fetch(const T* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
}

// Numbers in the order in which load_two gives those of a row of T.
template <typename T>
inline void reorder(const T* from, float factor, int64_t dim, float* to) {
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
        Vector first, second;
        load_two(from + d, first, second);
        put(first * splat(factor), to + d);
        put(second * splat(factor), to + d + LANES);
    }
    for (; d < dim; ++d) to[d] = widen(from[d]) * factor;
}

// f(0) to f(COUNT - 1), of numbers that the compiler knows from the start, so that arrays of vectors are registers.
template <typename F, int... I>
__attribute__((always_inline)) inline void with_numbers(std::integer_sequence<int, I...>, const F& f) { (f(std::integral_constant<int, I>()), ...); }
template <int COUNT, typename F>
__attribute__((always_inline)) inline void times(const F& f) { with_numbers(std::make_integer_sequence<int, COUNT>(), f); }

// The same pointer, of which the compiler does not know that: what it loads through it, it loads again, and registers are left for sums.
template <typename P>
inline P* anew(P* pointer) {
    asm volatile("" : "+r"(pointer));
    return pointer;
}

// Products of H reordered queries with KEYS keys, whose heads begin at `offset`, to scores[h * stride + key]. Never inlined: among other code
// the compiler runs out of registers.
template <int H, typename T>
__attribute__((noinline)) void score(const T* const* keys, int64_t offset, const float* query, int64_t dim, float* scores, int64_t stride) {
    Vector sums[KEYS][H];
    times<KEYS>([&](auto j) { times<H>([&](auto h) { sums[j][h] = splat(0.0f); }); });
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES)
        times<KEYS>([&](auto j) {
            Vector first, second;
            load_two(keys[j] + offset + d, first, second);
            times<H>([&](auto h) {
                sums[j][h] = fma(first, load(query + h * dim + d), sums[j][h]);
                sums[j][h] = fma(second, load(query + h * dim + d + LANES), sums[j][h]);
            });
        });
    times<H>([&](auto h) { sum_four(sums[0][h], sums[1][h], sums[2][h], sums[3][h], scores + h * stride); });
    for (; d < dim; ++d)
        for (int h = 0; h < H; ++h)
            for (int j = 0; j < KEYS; ++j) {
                float& score = scores[h * stride + j];
                score = fused(query[h * dim + d], widen(keys[j][offset + d]), score);
            }
}

// Values of one head for `count` positions; the first `left` slots are those of its sequence, of which AT_ONCE more are fetched.
template <typename T>
struct Values {
    const T* data;
    int64_t stride;
    const int64_t* slots;
    int64_t count, left;
    const T* row(int64_t i) const { return data + slots[i] * stride; }
};

// Weighted sums of rows of MIXED values for H heads, weights[h * stride + position], to out[h * out_stride], or on top of what is there.
constexpr int64_t MIXED = 4 * LANES;
template <int H, typename T>
__attribute__((noinline)) void mix(const Values<T>& values, const float* weights, int64_t stride, bool goes_on, float* out, int64_t out_stride) {
    Vector sums[H][4];
    times<H>([&](auto h) { times<4>([&](auto v) { sums[h][v] = goes_on ? load(out + h * out_stride + v * LANES) : splat(0.0f); }); });
    for (int64_t i = 0; i < values.count; ++i) {
        const T* const row = values.row(i);
        if (i + AT_ONCE < values.left) fetch(values.row(i + AT_ONCE), MIXED);
        times<2>([&](auto half) {
            Vector first, second;
            load_two(row + half * 2 * LANES, first, second);
            const float* const own = anew(weights);
            times<H>([&](auto h) {
                const Vector weight = splat(own[h * stride + i]);
                sums[h][2 * half] = fma(weight, first, sums[h][2 * half]);
                sums[h][2 * half + 1] = fma(weight, second, sums[h][2 * half + 1]);
            });
        });
    }
    times<H>([&](auto h) { times<4>([&](auto v) { put(sums[h][v], out + h * out_stride + v * LANES); }); });
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
    const int64_t whole = dim / MIXED * MIXED;
    for (int64_t d = 0; d < whole; d += 2 * LANES)
        put_two(load(from + d) * splat(factor), load(from + d + LANES) * splat(factor), to + d);
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

// Positions [first, last] of one sequence and KV heads [from, to): what the query at position `own` makes of them. Rows of the cache are read
// from their beginnings to their ends, all heads of a position after each other, as memory gives them fastest.
template <typename T>
void decode(const Shape& shape, const T* query, const T* keys, const T* values, const int32_t* table, int64_t first, int64_t last,
            int64_t own, int64_t from, int64_t to, const Extras& extras, const Partial& partial) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int64_t> slots;
    const int64_t dim = shape.key_dim, value_dim = shape.value_dim, length = last - first + 1;
    const int64_t stride = (length + KEYS + ROW_LANES - 1) / ROW_LANES * ROW_LANES;  // room for whole vectors
    const int64_t first_head = from * shape.group, heads = (to - from) * shape.group;
    const int64_t ahead = std::max<int64_t>(KEYS, FETCHED / ((to - from) * dim * static_cast<int64_t>(sizeof(T))));
    float *const scores = at_line(scratch, heads * (stride + dim)), *const wide = scores + heads * stride;
    slots.resize(length);
    find_slots(shape, table, first, last, slots.data());
    for (int64_t h = 0; h < heads; ++h) reorder(query + (first_head + h) * dim, shape.scale, dim, wide + h * dim);
    for (int64_t i = 0; i < length; i += KEYS) {
        const T* rows[KEYS];
        for (int j = 0; j < KEYS; ++j) {
            rows[j] = keys + slots[std::min(i + j, length - 1)] * shape.key_stride;
            const int64_t next = i + j + ahead;
            if (next < length) fetch(keys + slots[next] * shape.key_stride + from * dim, (to - from) * dim);
            else if (next - length < length) fetch(values + slots[next - length] * shape.value_stride + from * value_dim, (to - from) * value_dim);
        }
        each_heads(shape, from, to, [&](auto some, int64_t kv, int64_t head) {
            score<some>(rows, kv * dim, wide + (head - first_head) * dim, dim, scores + (head - first_head) * stride + i, stride);
        });
    }
    each_heads(shape, from, to, [&](auto some, int64_t, int64_t head) {
        weigh_partly(shape, extras.of(shape, head), some, scores + (head - first_head) * stride, length, stride, own - first,
                     partial.largest + head, partial.total + head);
    });
    for (int64_t i = 0; i < length; i += AT_ONCE)
        each_heads(shape, from, to, [&](auto some, int64_t kv, int64_t head) {
            Values<T> some_values{values + kv * value_dim, shape.value_stride, slots.data() + i, std::min(AT_ONCE, length - i), length - i};
            const float* const weights = scores + (head - first_head) * stride + i;
            float* const sums = partial.sums + head * value_dim;
            int64_t d = 0;
            for (; d + MIXED <= value_dim; d += MIXED, some_values.data += MIXED)
                mix<some>(some_values, weights, stride, i > 0, sums + d, value_dim);
            for (; d < value_dim; ++d, ++some_values.data)
                for (int h = 0; h < some; ++h) {
                    float sum = i > 0 ? sums[h * value_dim + d] : 0.0f;
                    for (int64_t k = 0; k < some_values.count; ++k) sum = fused(weights[h * stride + k], widen(*some_values.row(k)), sum);
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
            total = fused(part.total[h], factor, total);
            for (int64_t d = 0; d < dim; ++d) sums[d] = fused(part.sums[h * dim + d], factor, p > 0 ? sums[d] : 0.0f);
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
}  // namespace shardwright
