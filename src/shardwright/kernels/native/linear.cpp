// Linear layers with bfloat16 weights for a few tokens: each weight is read from memory once, widened in registers, and used for all
// tokens. Sums are float32. Plain C interface, no torch headers; see kernels/linear.py for shapes.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int MAX_TOKENS = 16;  // as in kernels/linear.py

inline float widen(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t narrow(float value) {  // to nearest, ties to even; not-a-number stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Vector = __m512;
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load_wide(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
using Vector = __m256;
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load_wide(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vector v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
constexpr int LANES = 1;
using Vector = float;
inline Vector zero() { return 0.0f; }
inline Vector load(const float* p) { return *p; }
inline Vector load_wide(const uint16_t* p) { return widen(*p); }
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
inline float sum(Vector v) { return v; }
#endif

// Dot products of R rows of weights with T rows of inputs: R * T sums stay in registers over the whole row.
template <int R, int T>
inline void tile(const uint16_t* weight, const float* input, size_t inner, float* out, size_t out_stride) {
    Vector sums[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sums[r][t] = zero();
    size_t k = 0;
    for (; k + LANES <= inner; k += LANES) {
        Vector w[R];
        for (int r = 0; r < R; ++r) w[r] = load_wide(weight + r * inner + k);
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
