// Attention of sequences with one query each.

#pragma once

#include "attention.h"

namespace {

constexpr int KEYS = 4;   // at once
constexpr int HEADS = 3;  // query heads at once: with as many keys, their sums fill the registers

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

// Products of H reordered queries with KEYS keys, to scores[h * stride + key].
template <int H, typename T>
inline void score(const T* const* keys, const float* query, int64_t dim, float* scores, int64_t stride) {
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
    for (int h = 0; h < H; ++h) {
        float four[KEYS];
        sum_four(sums[0][h], sums[1][h], sums[2][h], sums[3][h], four);
        for (int j = 0; j < KEYS; ++j) {
            for (int64_t rest = d; rest < dim; ++rest) four[j] += query[h * dim + rest] * widen(keys[j][rest]);
            scores[h * stride + j] = four[j];
        }
    }
}

// Weighted sums of values for H heads: weights[h * stride + position], to output[h * dim].
template <int H, typename T>
inline void mix(const Shape& shape, const T* values, const int64_t* slots, int64_t length, const float* weights, int64_t stride, T* output) {
    constexpr int64_t WIDE = 4 * LANES;
    const int64_t dim = shape.value_dim;
    int64_t d = 0;
    for (; d + WIDE <= dim; d += WIDE) {
        Vector sums[H][4];
        for (int h = 0; h < H; ++h)
            for (int v = 0; v < 4; ++v) sums[h][v] = splat(0.0f);
        for (int64_t i = 0; i < length; ++i) {
            const T* row = values + slots[i] * shape.value_stride + d;
            for (int half = 0; half < 2; ++half) {
                Vector first, second;
                load_two(row + half * 2 * LANES, first, second);
                for (int h = 0; h < H; ++h) {
                    const Vector weight = splat(weights[h * stride + i]);
                    sums[h][2 * half] = fma(weight, first, sums[h][2 * half]);
                    sums[h][2 * half + 1] = fma(weight, second, sums[h][2 * half + 1]);
                }
            }
        }
        for (int h = 0; h < H; ++h) {
            alignas(64) float row[WIDE];
            for (int v = 0; v < 4; ++v) put(sums[h][v], row + v * LANES);
            for (int64_t i = 0; i < WIDE; ++i) {
                const int64_t lane = i % (2 * LANES);
                const int64_t place = is_bfloat16(values) ? i - lane + lane % 2 * LANES + lane / 2 : i;
                store(row[place], output + h * dim + d + i);
            }
        }
    }
    for (; d < dim; ++d)
        for (int h = 0; h < H; ++h) {
            float sum = 0.0f;
            for (int64_t i = 0; i < length; ++i) sum += weights[h * stride + i] * widen(values[slots[i] * shape.value_stride + d]);
            store(sum, output + h * dim + d);
        }
}

// H query heads of one sequence.
template <int H, typename T>
void decode_heads(const Shape& shape, const T* query, const T* keys, const T* values, const int64_t* slots, int64_t length,
                  const Extras& extras, float* scratch, T* output) {
    const int64_t dim = shape.key_dim, stride = length + KEYS;
    float *wide = scratch, *scores = scratch + H * dim;
    for (int h = 0; h < H; ++h) reorder(query + h * dim, shape.scale, dim, wide + h * dim);
    for (int64_t i = 0; i < length; i += KEYS) {
        const T* some[KEYS];
        for (int j = 0; j < KEYS; ++j) some[j] = keys + slots[std::min(i + j, length - 1)] * shape.key_stride;
        score<H>(some, wide, dim, scores + i, stride);
    }
    for (int h = 0; h < H; ++h) weigh(shape, extras.of(shape, h), scores + h * stride, length);
    mix<H>(shape, values, slots, length, scores, stride, output);
}

// The query heads of one sequence that share a KV head.
template <typename T>
void decode_group(const Shape& shape, const T* query, const T* keys, const T* values, const int32_t* table, int64_t first, int64_t last,
                  const Extras& extras, T* output) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int64_t> slots;
    const int64_t length = last - first + 1;
    scratch.resize(HEADS * (shape.key_dim + length + KEYS));
    slots.resize(length);
    find_slots(shape, table, first, last, slots.data());
    for (int64_t head = 0; head < shape.group; head += HEADS) {
        const Extras own = extras.of(shape, head);
        const T* from = query + head * shape.key_dim;
        T* to = output + head * shape.value_dim;
        const auto heads = [&](auto count) {
            decode_heads<decltype(count)::value>(shape, from, keys, values, slots.data(), length, own, scratch.data(), to);
        };
        switch (std::min<int64_t>(HEADS, shape.group - head)) {
            case 1: heads(std::integral_constant<int, 1>()); break;
            case 2: heads(std::integral_constant<int, 2>()); break;
            default: heads(std::integral_constant<int, 3>());
        }
    }
}

}  // namespace
