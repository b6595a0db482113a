// Products of a few tokens with a matrix of weights, bfloat16 or float32: each weight is read from memory once, widened in registers, and
// used for all tokens. Sums are float32. Included by what offers it; see kernels/linear.py for shapes.

#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t TWO = 2 * LANES;

// Puts features in the order in which load_two gives weights: of each TWO bfloat16 ones, first the even places, then the odd.
inline void reorder(const float*, const float* input, int64_t count, float* output) { std::copy(input, input + count, output); }
inline void reorder(const uint16_t*, const float* input, int64_t count, float* output) {
    int64_t k = 0;
    for (; k + TWO <= count; k += TWO)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            output[k + lane] = input[k + 2 * lane];
            output[k + LANES + lane] = input[k + 2 * lane + 1];
        }
    std::copy(input + k, input + count, output + k);
}

// Dot products of R rows of weights with T rows of reordered inputs: all sums stay in registers over the whole row.
template <int R, int T, int AHEAD, typename W>
inline void tile(const W* weight, const float* input, int64_t inner, float* out, int64_t out_stride) {
    constexpr int CHAINS = R * T <= 6 ? 2 : 1;  // few sums: two for each hide more latency
    Vector sums[R][T][CHAINS];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < CHAINS; ++c) sums[r][t][c] = splat(0.0f);
    int64_t k = 0;
    for (; k + TWO <= inner; k += TWO) {
        Vector first[R], second[R];
        for (int r = 0; r < R; ++r) {
            load_two(weight + r * inner + k, first[r], second[r]);
            if (AHEAD) __builtin_prefetch(weight + (r + AHEAD) * inner + k);
        }
        for (int t = 0; t < T; ++t) {
            const Vector x = load(input + t * inner + k), y = load(input + t * inner + k + LANES);
            for (int r = 0; r < R; ++r) {
                sums[r][t][0] = fma(first[r], x, sums[r][t][0]);
                sums[r][t][CHAINS - 1] = fma(second[r], y, sums[r][t][CHAINS - 1]);
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            float total = 0.0f;
            for (int c = 0; c < CHAINS; ++c) total += sum(sums[r][t][c]);
            for (int64_t rest = k; rest < inner; ++rest) total += widen(weight[r * inner + rest]) * input[t * inner + rest];
            out[t * out_stride + r] = total;
        }
}

// R rows of weights with all tokens.
template <int R, typename W>
inline void rows(const W* weight, const float* input, int64_t tokens, int64_t inner, float* out, int64_t out_stride) {
    int64_t t = 0;
    if (tokens >= 4) {  // the first to read these weights
        tile<R, 4, 6>(weight, input, inner, out, out_stride);
        t = 4;
    }
    for (; t + 4 <= tokens; t += 4) tile<R, 4, 0>(weight, input + t * inner, inner, out + t * out_stride, out_stride);
    for (; t + 2 <= tokens; t += 2) tile<R, 2, 0>(weight, input + t * inner, inner, out + t * out_stride, out_stride);
    for (; t < tokens; ++t) tile<R, 1, 4>(weight, input + t * inner, inner, out + t * out_stride, out_stride);
}

// input [tokens, inner] and weight [outer, inner], both contiguous; tokens at most MOST. emit(token, output feature, sum) takes what comes out.
template <int MOST, typename W, typename Emit>
void multiply(const float* given, const W* weight, int64_t tokens, int64_t inner, int64_t outer, Emit emit) {
    thread_local std::vector<float> reordered;
    reordered.resize(tokens * inner);
    for (int64_t t = 0; t < tokens; ++t) reorder(weight, given + t * inner, inner, reordered.data() + t * inner);
    const float* input = reordered.data();
    constexpr int BLOCK = 24, FEW = 4, MANY = 2;  // rows at once: enough sums to hide latency, few enough for AVX2's registers
    const int64_t num_blocks = (outer + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t first = block * BLOCK, last = first + BLOCK < outer ? first + BLOCK : outer;
        float sums[MOST * BLOCK];
        int64_t n = first;
        if (tokens == 1)
            for (; n + FEW <= last; n += FEW) rows<FEW>(weight + n * inner, input, tokens, inner, sums + (n - first), BLOCK);
        for (; n + MANY <= last; n += MANY) rows<MANY>(weight + n * inner, input, tokens, inner, sums + (n - first), BLOCK);
        for (; n < last; ++n) rows<1>(weight + n * inner, input, tokens, inner, sums + (n - first), BLOCK);
        for (int64_t t = 0; t < tokens; ++t)
            for (n = first; n < last; ++n) emit(t, n, sums[t * BLOCK + (n - first)]);
    }
}

}  // namespace
