// Attention of sequences with one query each.

#pragma once

#include "attention.h"

namespace {

constexpr int KEYS = 4;   // at once
constexpr int HEADS = 3;  // query heads at once: with as many keys, their sums and what they are made of fill 16 registers

constexpr int64_t FETCHED = 16;  // keys or values between what is computed with and what is fetched: their rows lie apart from each other

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

// Weighted sums of rows of MIXED values for H heads: weights[h * stride + position], to sums[h].
constexpr int64_t MIXED = 4 * LANES;
template <int H, typename T>
__attribute__((noinline)) void mix(const T* values, int64_t value_stride, const int64_t* slots, int64_t length, const float* weights,
                                   int64_t stride, float (*out)[MIXED]) {
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
        for (int v = 0; v < 4; ++v) put(sums[h][v], out[h] + v * LANES);
}

// H query heads of one sequence; rows of `stride` scores.
template <int H, typename T>
void decode_heads(const Shape& shape, const T* query, const T* keys, const T* values, const int64_t* slots, int64_t length, int64_t stride,
                  const Extras& extras, float* scratch, T* output) {
    const int64_t dim = shape.key_dim, value_dim = shape.value_dim;
    float *wide = scratch, *scores = scratch + H * dim, factors[H];
    for (int h = 0; h < H; ++h) reorder(query + h * dim, shape.scale, dim, wide + h * dim);
    for (int64_t i = 0; i < length; i += KEYS) {
        const T* some[KEYS];
        for (int j = 0; j < KEYS; ++j) {
            some[j] = keys + slots[std::min(i + j, length - 1)] * shape.key_stride;
            const int64_t ahead = i + j + FETCHED;
            if (ahead < length) fetch(keys + slots[ahead] * shape.key_stride, dim);
            else if (ahead - length < length) fetch(values + slots[ahead - length] * shape.value_stride, value_dim);
        }
        score<H>(some, wide, dim, scores + i, stride);
    }
    for (int h = 0; h < H; ++h) factors[h] = weigh(shape, extras.of(shape, h), scores + h * stride, 0, length - 1, stride);
    int64_t d = 0;
    for (; d + MIXED <= value_dim; d += MIXED) {
        alignas(64) float sums[H][MIXED];
        mix<H>(values + d, shape.value_stride, slots, length, scores, stride, sums);
        for (int h = 0; h < H; ++h) {
            float in_order[MIXED];
            for (int64_t i = 0; i < MIXED; i += 2 * LANES)
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const int64_t step = is_bfloat16(values) ? 2 : 1, second = is_bfloat16(values) ? 1 : LANES;
                    in_order[i + step * lane] = sums[h][i + lane] * factors[h];
                    in_order[i + step * lane + second] = sums[h][i + LANES + lane] * factors[h];
                }
            for (int64_t i = 0; i < MIXED; ++i) store(in_order[i], output + h * value_dim + d + i);
        }
    }
    for (; d < value_dim; ++d)
        for (int h = 0; h < H; ++h) {
            float sum = 0.0f;
            for (int64_t i = 0; i < length; ++i) sum += scores[h * stride + i] * widen(values[slots[i] * shape.value_stride + d]);
            store(sum * factors[h], output + h * value_dim + d);
        }
}

// The query heads of one sequence that share a KV head.
template <typename T>
void decode_group(const Shape& shape, const T* query, const T* keys, const T* values, const int32_t* table, int64_t first, int64_t last,
                  const Extras& extras, T* output) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int64_t> slots;
    const int64_t length = last - first + 1;
    const int64_t stride = (length + KEYS + ROW_LANES - 1) / ROW_LANES * ROW_LANES;  // room for whole vectors
    scratch.resize(HEADS * (shape.key_dim + stride) + 16);
    float* const own_scratch = scratch.data() + (-reinterpret_cast<intptr_t>(scratch.data()) & 63) / 4;
    slots.resize(length);
    find_slots(shape, table, first, last, slots.data());
    for (int64_t head = 0; head < shape.group; head += HEADS) {
        const Extras own = extras.of(shape, head);
        const T* from = query + head * shape.key_dim;
        T* to = output + head * shape.value_dim;
        const auto heads = [&](auto count) {
            decode_heads<decltype(count)::value>(shape, from, keys, values, slots.data(), length, stride, own, own_scratch, to);
        };
        switch (std::min<int64_t>(HEADS, shape.group - head)) {
            case 1: heads(std::integral_constant<int, 1>()); break;
            case 2: heads(std::integral_constant<int, 2>()); break;
            default: heads(std::integral_constant<int, 3>());
        }
    }
}

}  // namespace
