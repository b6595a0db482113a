// Attention over the paged cache: keys and values are read where they lie, once for all query heads that share them. Sums are float32.
// Included by what offers it; see kernels/attention.py for shapes.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace shardwright {

struct Shape {
    int64_t kv_heads, group, key_dim, value_dim, block_size;
    int64_t key_stride, value_stride;  // elements from one token to the next
    float scale, softcap;              // softcap 0: none
    int64_t distances;                 // of the bias of each head
};

// The sequences of a step: number s has tokens starts[s] to starts[s + 1], and token t sees positions first[t] to last[t] of its own.
struct Sequences {
    int64_t count;
    const int64_t* starts;
    const int32_t* tables;
    int64_t table_stride;
    const int64_t *first, *last;
};

// What is added to scores, for one query head on; null: nothing.
struct Extras {
    const float *sinks, *bias;
    Extras of(const Shape& shape, int64_t head) const {
        return {sinks ? sinks + head : nullptr, bias ? bias + head * shape.distances : nullptr};
    }
};

// Slots of positions first to last of a sequence.
inline void find_slots(const Shape& shape, const int32_t* table, int64_t first, int64_t last, int64_t* slots) {
    for (int64_t p = first; p <= last;) {
        const int64_t block = p / shape.block_size, end = std::min((block + 1) * shape.block_size, last + 1);
        const int64_t base = table[block] * shape.block_size - block * shape.block_size;
        for (; p < end; ++p) *slots++ = base + p;
    }
}

// Caps scores and adds the bias: of `count` positions, the first of which is `distance` before the query.
inline void adjust(const Shape& shape, const Extras& extras, float* row, int64_t count, int64_t distance) {
    if (shape.softcap > 0)
        for (int64_t i = 0; i < count; ++i) row[i] = std::tanh(row[i] / shape.softcap) * shape.softcap;
    if (extras.bias)
        for (int64_t i = 0; i < count; ++i) row[i] += extras.bias[std::min(distance - i, shape.distances - 1)];
}

// Scores row[first] to row[last] of the positions that one query sees, its own the last, become weights, and all others of the row's
// `width` numbers 0. Returns the factor by which they add up to 1, or to less with a sink.
inline float weigh(const Shape& shape, const Extras& extras, float* row, int64_t first, int64_t last, int64_t width) {
    adjust(shape, extras, row + first, last - first + 1, last - first);
    std::fill(row, row + first, -INFINITY);
    std::fill(row + last + 1, row + width, -INFINITY);
    const float highest = largest_of(row, width), largest = extras.sinks ? std::max(highest, *extras.sinks) : highest;
    for (int64_t i = 0; i < width; ++i) row[i] = exponential_below_one(row[i] - largest);
    return 1.0f / (sum_of(row, width) + (extras.sinks ? exponential(*extras.sinks - largest) : 0.0f));
}

}  // namespace shardwright
