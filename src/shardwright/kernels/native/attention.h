// Attention of decodes over the paged cache: one query per sequence, keys and values read where they lie, once for all query heads
// that share them. Sums are float32. Included by what offers it; see kernels/attention.py for shapes.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

struct Shape {
    int64_t kv_heads, group, key_dim, value_dim, block_size;
    int64_t key_stride, value_stride;  // elements from one token to the next
    float scale, softcap;              // softcap 0: none
    int64_t distances;                 // of the bias of each head
};

template <typename T>
inline float dot(const float* query, const T* key, int64_t dim) {
    Vector total = splat(0.0f);
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) total = fma(load(query + d), load(key + d), total);
    float result = sum(total);
    for (; d < dim; ++d) result += query[d] * widen(key[d]);
    return result;
}

template <typename T>
inline void add(float weight, const T* value, float* out, int64_t dim) {
    const Vector factor = splat(weight);
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) put(fma(factor, load(value + d), load(out + d)), out + d);
    for (; d < dim; ++d) out[d] += weight * widen(value[d]);
}

// One sequence and KV head: positions first to last, both included.
template <typename T>
void attend(const Shape& shape, const T* query, const T* keys, const T* values, const int32_t* table, int64_t first, int64_t last,
            const float* sinks, const float* bias, T* output) {
    thread_local std::vector<float> scratch;
    const int64_t group = shape.group, length = last - first + 1;
    scratch.resize(group * (shape.key_dim + length + shape.value_dim));
    float* wide_query = scratch.data();
    float* scores = wide_query + group * shape.key_dim;
    float* sums = scores + group * length;
    for (int64_t i = 0; i < group * shape.key_dim; ++i) wide_query[i] = widen(query[i]) * shape.scale;
    std::fill(sums, sums + group * shape.value_dim, 0.0f);

    for (int64_t p = first; p <= last; ++p) {
        const int64_t slot = table[p / shape.block_size] * shape.block_size + p % shape.block_size;
        const T* key = keys + slot * shape.key_stride;
        for (int64_t g = 0; g < group; ++g)
            scores[g * length + p - first] = dot(wide_query + g * shape.key_dim, key, shape.key_dim);
    }
    for (int64_t g = 0; g < group; ++g) {
        float* row = scores + g * length;
        if (shape.softcap > 0)
            for (int64_t i = 0; i < length; ++i) row[i] = std::tanh(row[i] / shape.softcap) * shape.softcap;
        if (bias)
            for (int64_t i = 0; i < length; ++i)
                row[i] += bias[g * shape.distances + std::min(length - 1 - i, shape.distances - 1)];
        float largest = sinks ? sinks[g] : -INFINITY;
        for (int64_t i = 0; i < length; ++i) largest = std::max(largest, row[i]);
        float total = sinks ? exponential(sinks[g] - largest) : 0.0f;
        for (int64_t i = 0; i < length; ++i) row[i] = exponential(row[i] - largest);
        for (int64_t i = 0; i < length; ++i) total += row[i];
        for (int64_t i = 0; i < length; ++i) row[i] /= total;
    }
    for (int64_t p = first; p <= last; ++p) {
        const int64_t slot = table[p / shape.block_size] * shape.block_size + p % shape.block_size;
        const T* value = values + slot * shape.value_stride;
        for (int64_t g = 0; g < group; ++g)
            add(scores[g * length + p - first], value, sums + g * shape.value_dim, shape.value_dim);
    }
    for (int64_t i = 0; i < group * shape.value_dim; ++i) store(sums[i], output + i);
}

template <typename T>
void decode(const Shape& shape, int64_t sequences, const T* query, const T* keys, const T* values, const int32_t* tables,
            int64_t table_stride, const int64_t* first, const int64_t* last, const float* sinks, const float* bias,
            T* output) {
    const int64_t heads = shape.kv_heads * shape.group;
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t k = 0; k < shape.kv_heads; ++k)
            attend(shape, query + (s * heads + k * shape.group) * shape.key_dim, keys + k * shape.key_dim,
                   values + k * shape.value_dim, tables + s * table_stride, first[s], last[s],
                   sinks ? sinks + k * shape.group : nullptr,
                   bias ? bias + k * shape.group * shape.distances : nullptr, output + (s * heads + k * shape.group) * shape.value_dim);
}

}  // namespace
