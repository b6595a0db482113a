// Linear layers with weights of 8 or 4 bits: codes are read from memory once, widened in registers, and used for all tokens. Sums are
// float32. Plain C interface, no torch headers; see kernels/quantized_weight.py for how codes lie, kernels/quantized_linear.py for shapes.

#include <algorithm>

#include "vector.h"

namespace {

constexpr int BLOCK = 32;  // inputs whose codes lie together, as in weight_format.py
constexpr int VECTORS = BLOCK / LANES;

inline const int8_t* block(const int8_t* codes, int64_t b) { return codes + b * BLOCK; }
inline const uint8_t* block(const uint8_t* codes, int64_t b) { return codes + b * (BLOCK / 2); }

#if defined(__AVX512F__)
inline void decode(const int8_t* codes, Vector* out) {
    for (int v = 0; v < VECTORS; ++v)
        out[v] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + v)));
}
inline void decode(const uint8_t* codes, Vector* out) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), mask = _mm_set1_epi8(15);
    out[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(both, mask)));
    out[1] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(both, 4), mask)));
}
#elif defined(__AVX2__) && defined(__FMA__)
inline void decode(const int8_t* codes, Vector* out) {
    for (int v = 0; v < VECTORS; ++v)
        out[v] = _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + v * LANES))));
}
inline void decode(const uint8_t* codes, Vector* out) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
    out[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)));
    out[2] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
    out[3] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)));
}
#else
inline void decode(const int8_t* codes, Vector* out) {
    for (int i = 0; i < BLOCK; ++i) out[i] = codes[i];
}
inline void decode(const uint8_t* codes, Vector* out) {
    for (int i = 0; i < BLOCK / 2; ++i) {
        out[i] = codes[i] & 15;
        out[i + BLOCK / 2] = codes[i] >> 4;
    }
}
#endif

// What all outputs of a weight have in common. Groups are whole blocks; minimums are null in 8 bits.
template <class Code>
struct Weight {
    const Code* codes;
    const uint16_t* scales;
    const uint16_t* minimums;
    int64_t num_blocks, blocks_per_group, num_groups;

    // Calls take(number of the block, its 32 weights) for all blocks of an output.
    template <class Take>
    inline void widened(int64_t output, Take take) const {
        const Code* row = block(codes, output * num_blocks);
        int64_t b = 0;
        for (int64_t g = output * num_groups; b < num_blocks; ++g) {
            const Vector scale = splat(widen(scales[g])), minimum = splat(minimums ? widen(minimums[g]) : 0.0f);
            for (const int64_t end = std::min(b + blocks_per_group, num_blocks); b < end; ++b) {
                Vector weights[VECTORS];
                decode(block(row, b), weights);
                for (int v = 0; v < VECTORS; ++v) weights[v] = fma(weights[v], scale, minimum);
                take(b, weights);
            }
        }
    }

    // Dot products of an output's weights with T inputs.
    template <int T>
    inline void multiply(int64_t output, const float* input, float* out) const {
        constexpr int SUMS = LANES == 1 ? 8 : T == 1 ? VECTORS : 1;  // enough of them to hide the latency of an addition
        Vector sums[T][SUMS];
        for (int t = 0; t < T; ++t)
            for (int s = 0; s < SUMS; ++s) sums[t][s] = splat(0.0f);
        widened(output, [&](int64_t b, const Vector* weights) {
            for (int t = 0; t < T; ++t)
                for (int v = 0; v < VECTORS; ++v)
                    sums[t][v % SUMS] =
                        fma(weights[v], load(input + (t * num_blocks + b) * BLOCK + v * LANES), sums[t][v % SUMS]);
        });
        for (int t = 0; t < T; ++t) {
            out[t] = 0.0f;
            for (int s = 0; s < SUMS; ++s) out[t] += sum(sums[t][s]);
        }
    }
};

// input [tokens, blocks * 32] float32, filled up with zeros; bias [outputs] or null; output [tokens, outputs].
template <class Code, class Number>
void linear(const Weight<Code>& weight, const float* input, const Number* bias, Number* output, int64_t tokens, int64_t outputs) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < outputs; ++n) {
        const auto keep = [&](int64_t first, const float* sums, int count) {
            for (int t = 0; t < count; ++t) store(sums[t] + (bias ? widen(bias[n]) : 0.0f), output + (first + t) * outputs + n);
        };
        float sums[8];
        int64_t t = 0;
        for (; t + 8 <= tokens; t += 8) {
            weight.template multiply<8>(n, input + t * weight.num_blocks * BLOCK, sums);
            keep(t, sums, 8);
        }
        for (; t + 3 <= tokens; t += 3) {
            weight.template multiply<3>(n, input + t * weight.num_blocks * BLOCK, sums);
            keep(t, sums, 3);
        }
        for (; t < tokens; ++t) {
            weight.template multiply<1>(n, input + t * weight.num_blocks * BLOCK, sums);
            keep(t, sums, 1);
        }
    }
}

// output [last - first, blocks * 32] float32.
template <class Code>
void matrix(const Weight<Code>& weight, float* output, int64_t first, int64_t last) {
#pragma omp parallel for schedule(static)
    for (int64_t n = first; n < last; ++n)
        weight.widened(n, [&](int64_t b, const Vector* weights) {
            for (int v = 0; v < VECTORS; ++v) put(weights[v], output + ((n - first) * weight.num_blocks + b) * BLOCK + v * LANES);
        });
}

}  // namespace

// Numbers of bias and output are float32 (f32) or bfloat16 (bf16). All contiguous.
#define LINEAR(NAME, CODE, NUMBER)                                                                                              \
    extern "C" void NAME(const CODE* codes, const uint16_t* scales, const uint16_t* minimums, int64_t num_blocks,             \
                         int64_t blocks_per_group, int64_t num_groups, const float* input, const NUMBER* bias, NUMBER* output, \
                         int64_t tokens, int64_t outputs) {                                                                     \
        linear(Weight<CODE>{codes, scales, minimums, num_blocks, blocks_per_group, num_groups}, input, bias, output, tokens,   \
               outputs);                                                                                                        \
    }
LINEAR(linear_int8_f32, int8_t, float)
LINEAR(linear_int8_bf16, int8_t, uint16_t)
LINEAR(linear_int4_f32, uint8_t, float)
LINEAR(linear_int4_bf16, uint8_t, uint16_t)

#define MATRIX(NAME, CODE)                                                                                                  \
    extern "C" void NAME(const CODE* codes, const uint16_t* scales, const uint16_t* minimums, int64_t num_blocks,         \
                         int64_t blocks_per_group, int64_t num_groups, float* output, int64_t first, int64_t last) {       \
        matrix(Weight<CODE>{codes, scales, minimums, num_blocks, blocks_per_group, num_groups}, output, first, last);      \
    }
MATRIX(matrix_int8, int8_t)
MATRIX(matrix_int4, uint8_t)
