// Linear layers with bfloat16 weights for a few tokens: each weight is read from memory once, widened in registers, and used for all
// tokens. Sums are float32. Plain C interface, no torch headers; see kernels/linear.py for shapes.

#include "vector.h"

namespace {

constexpr int MAX_TOKENS = 16;  // as in kernels/linear.py

// Dot products of R rows of weights with T rows of inputs: R * T sums stay in registers over the whole row.
template <int R, int T>
inline void tile(const uint16_t* weight, const float* input, size_t inner, float* out, size_t out_stride) {
    Vector sums[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sums[r][t] = splat(0.0f);
    size_t k = 0;
    for (; k + LANES <= inner; k += LANES) {
        Vector w[R];
        for (int r = 0; r < R; ++r) w[r] = load(weight + r * inner + k);
        for (int t = 0; t < T; ++t) {
            Vector x = load(input + t * inner + k);
            for (int r = 0; r < R; ++r) sums[r][t] = fma(w[r], x, sums[r][t]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            float total = sum(sums[r][t]);
            for (size_t rest = k; rest < inner; ++rest) total += widen(weight[r * inner + rest]) * input[t * inner + rest];
            out[t * out_stride + r] = total;
        }
}

template <int R>
inline void rows(const uint16_t* weight, const float* input, size_t tokens, size_t inner, float* out, size_t out_stride) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4) tile<R, 4>(weight, input + t * inner, inner, out + t * out_stride, out_stride);
    for (; t < tokens; ++t) tile<R, 1>(weight, input + t * inner, inner, out + t * out_stride, out_stride);
}

}  // namespace

// input [tokens, inner] float32, weight [outer, inner] bfloat16, bias [outer] bfloat16 or null, output [tokens, outer] bfloat16.
// All contiguous; tokens at most MAX_TOKENS. Returns 0, or 1 if there are too many tokens.
extern "C" int linear_bf16(const float* input, const uint16_t* weight, const uint16_t* bias, uint16_t* output, int64_t tokens,
                           int64_t inner, int64_t outer) {
    if (tokens > MAX_TOKENS) return 1;
    constexpr int R = 2, BLOCK = 16;  // R * 4 sums fill half of the registers that AVX2 has
    const int64_t num_blocks = (outer + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t first = block * BLOCK, last = first + BLOCK < outer ? first + BLOCK : outer;
        float sums[MAX_TOKENS * BLOCK];
        int64_t n = first;
        for (; n + R <= last; n += R) rows<R>(weight + n * inner, input, tokens, inner, sums + (n - first), BLOCK);
        for (; n < last; ++n) rows<1>(weight + n * inner, input, tokens, inner, sums + (n - first), BLOCK);
        for (int64_t t = 0; t < tokens; ++t)
            for (n = first; n < last; ++n)
                output[t * outer + n] = narrow(sums[t * BLOCK + (n - first)] + (bias ? widen(bias[n]) : 0.0f));
    }
    return 0;
}
