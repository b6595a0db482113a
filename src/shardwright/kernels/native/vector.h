// Vectors of float32 on this machine; bfloat16, bytes and halves of bytes in memory. Included by every kernel; no state, no torch headers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace shardwright {

inline float widen(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline float widen(float value) { return value; }

// To the nearest number of bfloat16, ties to even; not-a-number stays one. In words of 32 bits, as vectors have them.
inline float round_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    bits = (value != value ? bits | 0x400000u : nearest) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint16_t narrow_rounded(float value) {  // what is a number of bfloat16 already
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}
inline uint16_t narrow(float value) { return narrow_rounded(round_half(value)); }
inline void store(float value, uint16_t* place) { *place = narrow(value); }
inline void store(float value, float* place) { *place = value; }

// a * b + c, rounded once where the machine does so in one operation; everything else is rounded one by one (kernels/jit.py).
__attribute__((always_inline)) inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// exp by 2^n * e^r with |r| <= ln 2 / 2 and a polynomial for e^r (Cephes' expf), written so that compilers vectorise it, which takes
// inlining: left to themselves they call it where it is used often. Returns e^r.
__attribute__((always_inline)) inline float exponential_parts(float x, int32_t& whole) {
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    whole = static_cast<int32_t>(n);
    return fused(p * r, r, r) + 1.0f;
}

__attribute__((always_inline)) inline float power_of_two(int32_t exponent) {
    const int32_t bits = (exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

__attribute__((always_inline)) inline float exponential(float x) {
    int32_t whole;
    const float part = exponential_parts(std::min(std::max(x, -104.0f), 88.72284f), whole);
    // In two factors: a single one would not hold 2^n for subnormal results or the largest
    const float result = part * power_of_two(whole / 2) * power_of_two(whole - whole / 2);
    return x > 88.72284f ? INFINITY : x < -104.0f ? 0.0f : x != x ? x : result;
}

// For x <= 0: what is smaller than the smallest normal number is 0.
__attribute__((always_inline)) inline float exponential_below_one(float x) {
    int32_t whole;
    const float part = exponential_parts(std::max(x, -87.0f), whole);
    return x < -87.0f ? 0.0f : part * power_of_two(whole);
}

__attribute__((always_inline)) inline float sigmoid(float x) {
    const float e = exponential_below_one(-std::fabs(x)), rest = 1.0f / (1.0f + e);
    return x < 0.0f ? e * rest : rest;
}

// Sums and maxima along a row go on in several lanes: that is faster, and keeps rounding small, as torch's own do.
constexpr int64_t ROW_LANES = 16;

inline float sum_of(const float* row, int64_t length) {
    float lanes[ROW_LANES] = {0};
    const int64_t rest = length % ROW_LANES, whole = length - rest;
    for (int64_t i = 0; i < whole; i += ROW_LANES)
        for (int64_t lane = 0; lane < ROW_LANES; ++lane) lanes[lane] += row[i + lane];
    for (int64_t lane = 0; lane < rest; ++lane) lanes[lane] += row[whole + lane];
    for (int64_t half = ROW_LANES / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

inline float largest_of(const float* row, int64_t length) {
    float lanes[ROW_LANES];
    std::fill(lanes, lanes + ROW_LANES, row[0]);
    int64_t i = 0;
    for (; i + ROW_LANES <= length; i += ROW_LANES)
        for (int64_t lane = 0; lane < ROW_LANES; ++lane) lanes[lane] = lanes[lane] < row[i + lane] ? row[i + lane] : lanes[lane];
    for (; i < length; ++i) lanes[0] = std::max(lanes[0], row[i]);
    return *std::max_element(lanes, lanes + ROW_LANES);
}

constexpr int64_t LINE = 64;  // bytes of the cache

// Room for `size` numbers that begins at a cache line, or vectors would be read in two pieces; what was there stays while the size does.
template <typename N>
inline N* at_line(std::vector<N>& scratch, int64_t size) {
    scratch.resize(size + LINE / sizeof(N));
    return scratch.data() + (-reinterpret_cast<intptr_t>(scratch.data()) & (LINE - 1)) / static_cast<intptr_t>(sizeof(N));
}

constexpr inline bool is_bfloat16(const float*) { return false; }
constexpr inline bool is_bfloat16(const uint16_t*) { return true; }

#if defined(__AVX512BW__)
constexpr int LANES = 16;
using Vector = __m512;
inline Vector splat(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline void put(Vector v, float* p) { _mm512_storeu_ps(p, v); }
inline Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
inline __m256 fold(Vector v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
using Vector = __m256;
inline Vector splat(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline void put(Vector v, float* p) { _mm256_storeu_ps(p, v); }
inline Vector plus(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vector v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline __m256 fold(Vector v) { return v; }
#else  // NEON, SSE, or whatever the compiler makes of vectors of four
constexpr int LANES = 4;
typedef float Vector __attribute__((vector_size(16)));
inline Vector splat(float value) { return Vector{value, value, value, value}; }
inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void put(Vector v, float* p) { std::memcpy(p, &v, sizeof v); }
inline Vector plus(Vector a, Vector b) { return a + b; }
#if defined(__aarch64__)
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
#else
inline Vector fma(Vector a, Vector b, Vector c) {
    for (int lane = 0; lane < LANES; ++lane) c[lane] = fused(a[lane], b[lane], c[lane]);
    return c;
}
#endif
inline float sum(Vector v) { return (v[0] + v[1]) + (v[2] + v[3]); }
#endif

typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

// Lane by lane, a > b ? a : b.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512BW__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_max_ps(a, b);
#else
    for (int lane = 0; lane < LANES; ++lane) b[lane] = a[lane] > b[lane] ? a[lane] : b[lane];
    return b;
#endif
}

// As for one number.
inline Bits round_half(Vector value) {
    const Bits bits = (Bits)value, nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Bits is_number = (Bits)(value == value);
    return ((nearest & is_number) | ((bits | 0x400000u) & ~is_number)) & 0xffff0000u;
}

// Two vectors of neighbouring numbers: of bfloat16, those at even places and those at odd ones, which takes no more than a shift and a mask.
inline void widen_two(Bits both, Vector& even, Vector& odd) {
    even = (Vector)(both << 16);
    odd = (Vector)(both & 0xffff0000u);
}
inline void load_two(const float* p, Vector& first, Vector& second) {
    first = load(p);
    second = load(p + LANES);
}
inline void load_two(const uint16_t* p, Vector& even, Vector& odd) {
    Bits both;
    std::memcpy(&both, p, sizeof both);
    widen_two(both, even, odd);
}

// As load_two gives them, rounded where they are stored in fewer bits.
inline void put_two(Vector first, Vector second, float* p) {
    put(first, p);
    put(second, p + LANES);
}
inline void put_two(Vector even, Vector odd, uint16_t* p) {
    const Bits both = (round_half(even) >> 16) | round_half(odd);
    std::memcpy(p, &both, sizeof both);
}

// Lane i of the result is lane i of a, or where STEP is in i, lane i - STEP of b; and lane i + STEP of a, or lane i of b.
template <int STEP, int... I>
inline void exchange_lanes(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    const Vector low = __builtin_shufflevector(a, b, (I & STEP ? LANES + I - STEP : I)...);
    b = __builtin_shufflevector(a, b, (I & STEP ? LANES + I : I + STEP)...);
#else
    typedef int32_t Lanes __attribute__((vector_size(LANES * 4)));
    const Vector low = (Vector)__builtin_shuffle((Lanes)a, (Lanes)b, Lanes{(I & STEP ? LANES + I - STEP : I)...});
    b = (Vector)__builtin_shuffle((Lanes)a, (Lanes)b, Lanes{(I & STEP ? LANES + I : I + STEP)...});
#endif
    a = low;
}

// Rows of a square become its columns (Eklundh, "A fast computer method for matrix transposing", 1972).
template <int STEP = LANES / 2>
__attribute__((always_inline)) inline void transpose(Vector (&rows)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
        if (!(i & STEP)) exchange_lanes<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, LANES>());
    if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

// Sums of all lanes of each.
inline void sum_four(Vector a, Vector b, Vector c, Vector d, float* out) {
#if defined(__AVX2__) && defined(__FMA__)
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
#endif
}

}  // namespace shardwright
