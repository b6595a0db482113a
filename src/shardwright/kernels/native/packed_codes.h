// Products with packed weights of 8 or 4 bits, see kernels/packed_codes.py. Inputs are rounded too, with a scale for each group of input
// features as the codes have one: to 16 bits, or those of bfloat16 beside codes of 4 bits to 8. A group's products and their sum are then exact
// integers, and the scales meet that sum. As many neighbouring products as an integer of 32 bits has inputs are summed by the instructions
// that multiply, pmaddwd and pmaddubsw of x86: 1.5 and 3 times the products of a float32 instruction.

#pragma once

#include <cfloat>

#include "packed.h"

namespace shardwright {
namespace {

constexpr int64_t UNIT = 4;               // groups are filled up to a multiple of so many input features
constexpr int64_t ROW_BYTES = PANEL * 2;  // codes that are read at once: 2 input features of 8 bits, 4 of 4 bits
constexpr int64_t LARGEST_CODE = 127;

typedef int16_t Words __attribute__((vector_size(PANEL * 2)));
typedef int32_t Integers __attribute__((vector_size(PANEL * 2)));

// By inputs of 16 bits: integer i of the sums grows by two products.
struct WordInputs {
    using Input = int16_t;
    using Part = Words;
    using Sums = Integers;
    static constexpr int64_t MOST_ROWS = INT64_MAX;
    static int64_t largest_input(int64_t group_size) { return std::min<int64_t>(32767, INT32_MAX / (LARGEST_CODE * group_size)); }
    static inline Integers total(Integers sums) { return sums; }

    static inline Integers add(Integers sums, Words codes, Integers x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        return (Integers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512BW__)
        return sums + (Integers)_mm512_madd_epi16((__m512i)codes, (__m512i)x);
#elif defined(__AVX2__) && defined(__FMA__)
        return sums + (Integers)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#elif defined(__aarch64__)
        const int16x8_t a = (int16x8_t)codes, b = (int16x8_t)x;
        return sums + (Integers)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
#else
        const Words b = (Words)x;
        for (int i = 0; i < LANES; ++i) sums[i] += codes[2 * i] * b[2 * i] + codes[2 * i + 1] * b[2 * i + 1];
        return sums;
#endif
    }
};

// Codes of 8 bits.
struct Codes8 : WordInputs {
    static constexpr int64_t ROW_INPUTS = 2, NUMBERS = 1;
    static constexpr int PARTS = 1;
    static int64_t place_of(int64_t input) { return input; }

    static inline void load(const uint8_t* place, int, Words& first, Words& second) {
        Bits16 codes;
        std::memcpy(&codes, place, sizeof codes);
        first = (Words)(codes << 8) >> 8;
        second = (Words)codes >> 8;
    }
};

// Codes of 4 bits: a word has those of input features 0 and 1, or 2 and 3, of two output features.
struct Codes4 : WordInputs {
    static constexpr int64_t ROW_INPUTS = 4, NUMBERS = 2;
    static constexpr int PARTS = 2;  // features 0 and 2, 1 and 3
    static int64_t place_of(int64_t input) { return (input & ~3) | (input & 1) << 1 | (input >> 1 & 1); }

    static inline void load(const uint8_t* place, int part, Words& first, Words& second) {
        Bits16 codes;
        std::memcpy(&codes, place, sizeof codes);
        if (part) codes >>= 8;
        first = (Words)(codes & 15);
        second = (Words)(codes >> 4 & 15);
    }
};

// Codes of 4 bits, by inputs of 8: four products. Where their sums are words, they overflow after more than MOST_ROWS rows.
struct Codes4OfBytes {
    using Input = int8_t;
    using Part = Bytes;
    static constexpr int64_t ROW_INPUTS = 4, NUMBERS = 2;
    static constexpr int PARTS = 1;
    static int64_t place_of(int64_t input) { return input; }
    static int64_t largest_input(int64_t) { return 127; }

    static inline void load(const uint8_t* place, int, Bytes& first, Bytes& second) {
        Bytes codes;
        std::memcpy(&codes, place, sizeof codes);
        first = codes & 15;
        second = (Bytes)((Bits16)codes >> 4) & 15;
    }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    static constexpr int64_t MOST_ROWS = INT64_MAX;
    using Sums = Integers;
    static inline Integers total(Integers sums) { return sums; }
    static inline Integers add(Integers sums, Bytes codes, Integers x) {
        return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
    }
#elif defined(__AVX512BW__)
    static constexpr int64_t MOST_ROWS = 8;
    using Sums = Words;
    static inline Integers total(Words sums) { return (Integers)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
    static inline Words add(Words sums, Bytes codes, Integers x) { return sums + (Words)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x); }
#elif defined(__AVX2__) && defined(__FMA__)
    static constexpr int64_t MOST_ROWS = 8;
    using Sums = Words;
    static inline Integers total(Words sums) { return (Integers)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
    static inline Words add(Words sums, Bytes codes, Integers x) { return sums + (Words)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
#elif defined(__ARM_FEATURE_DOTPROD)
    static constexpr int64_t MOST_ROWS = INT64_MAX;
    using Sums = Integers;
    static inline Integers total(Integers sums) { return sums; }
    static inline Integers add(Integers sums, Bytes codes, Integers x) {
        return (Integers)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, (int8x16_t)x);
    }
#else
    static constexpr int64_t MOST_ROWS = INT64_MAX;
    using Sums = Integers;
    static inline Integers total(Integers sums) { return sums; }
    static inline Integers add(Integers sums, Bytes codes, Integers x) {
        int8_t inputs[sizeof x];
        std::memcpy(inputs, &x, sizeof x);
        for (int i = 0; i < 4 * LANES; ++i) sums[i / 4] += codes[i] * inputs[i];
        return sums;
    }
#endif
};

// Calls f(codes) with those of so many bits, for inputs of bfloat16 or of float32.
template <typename F>
void with_codes(int64_t bits, bool is_half, F f) {
    if (bits == 8) f(Codes8());
    else if (is_half) f(Codes4OfBytes());
    else f(Codes4());
}

// Input features [first, last) of a group, and how many it is filled up to.
struct Span {
    int64_t first, last, filled;
    Span(int64_t group, int64_t group_size, int64_t inner)
        : first(group * group_size), last(std::min(first + group_size, inner)), filled((last - first + UNIT - 1) / UNIT * UNIT) {}
};

// What all groups are filled up to.
inline int64_t filled_inputs(int64_t inner, int64_t group_size) {
    const int64_t last = (inner + group_size - 1) / group_size - 1;
    return last * Span(0, group_size, group_size).filled + Span(last, group_size, inner).filled;
}

// Rounded tokens in the order in which tiles read them: each tile has [filled, its tokens] inputs, as integers of 32 bits that have
// neighbouring ones, and [groups, its tokens] scales, by which its inputs are multiplied, and sums of its rounded inputs.
struct Rounded {
    const int32_t* lanes;
    const float *scales, *sums;
    int64_t inner, group_size, groups, num_lanes;  // lanes of a token
};

// One token's group. What is not finite makes the scale not a number, and so the whole group.
template <class Codes>
inline void round_group(const float* row, const Span& span, int64_t most, typename Codes::Input* to, float& scale, float& sum) {
    using Input = typename Codes::Input;
    const int64_t count = span.last - span.first;
    int32_t bits = 0;  // of the largest number: those of numbers without a sign are in the order of the numbers
    for (int64_t i = 0; i < count; ++i) {
        int32_t own;
        std::memcpy(&own, row + i, sizeof own);
        bits = std::max(bits, own & 0x7fffffff);
    }
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const bool is_finite = largest <= FLT_MAX;
    const float wanted = static_cast<float>(most) / largest, factor = is_finite && wanted <= FLT_MAX ? wanted : 0.0f;
    int32_t total = 0;
    std::fill(to, to + span.filled, Input(0));
#pragma GCC ivdep  // bytes may be anything to the compiler
    for (int64_t i = 0; i < count; ++i) {
        const int32_t rounded = static_cast<int32_t>(std::nearbyint(row[i] * factor));
        to[Codes::place_of(i)] = static_cast<Input>(rounded);
        total += rounded;
    }
    scale = is_finite ? largest / static_cast<float>(most) : NAN;
    sum = static_cast<float>(total) * scale;
}

// read(token, first, last, row) brings some of one token's features.
template <class Codes, typename Read>
Rounded round_inputs(const Tiles& tiles, int64_t inner, int64_t group_size, Read read) {
    using Input = typename Codes::Input;
    constexpr int64_t LANE_INPUTS = sizeof(int32_t) / sizeof(Input);
    thread_local std::vector<int32_t> lanes;
    thread_local std::vector<float> scales, sums;
    const int64_t groups = (inner + group_size - 1) / group_size, most = Codes::largest_input(group_size);
    const int64_t group_lanes = Span(0, group_size, group_size).filled / LANE_INPUTS, stride = (group_lanes + LANES - 1) / LANES * LANES;
    const int64_t num_lanes = filled_inputs(inner, group_size) / LANE_INPUTS;
    lanes.resize(tiles.tokens * num_lanes);
    scales.resize(tiles.tokens * groups);
    sums.resize(tiles.tokens * groups);
    int32_t* const to_lanes = lanes.data();
    float *const to_scales = scales.data(), *const to_sums = sums.data();
    share(tiles.count * groups, tiles.tokens * inner >= WORTH_ARRANGING, [&](int64_t task) {
        thread_local std::vector<float> row;
        thread_local std::vector<int32_t> rounded;
        const int64_t tile = task / groups, group = task % groups;
        const int64_t first = tiles.start(tile), count = tiles.start(tile + 1) - first;
        const Span span(group, group_size, inner);
        row.resize(group_size);
        rounded.resize(TILE * stride);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t place = first * groups + group * count + t;
            read(first + t, span.first, span.last, row.data());
            Input* const own = reinterpret_cast<Input*>(rounded.data() + t * stride);
            round_group<Codes>(row.data(), span, most, own, to_scales[place], to_sums[place]);
        }
        interleave_rows(rounded.data(), stride, count, span.filled / LANE_INPUTS, to_lanes + first * num_lanes + group * group_lanes * count);
    });
    return {to_lanes, to_scales, to_sums, inner, group_size, groups, num_lanes};
}

// A packed weight of codes: panels of groups, each with its codes, PANEL scales and, of 4 bits, as many minimums.
template <class Codes>
struct Coded {
    static constexpr int64_t LEAST_TILES = 1;
    const uint8_t* weight;
    int64_t outer;

    static constexpr int64_t NUMBERS_BYTES = Codes::NUMBERS * PANEL * 2;

    static int64_t rows(int64_t inner, int64_t group_size) { return filled_inputs(inner, group_size) / Codes::ROW_INPUTS; }
    Panels panels(int64_t inner, int64_t group_size) const {
        const int64_t groups = (inner + group_size - 1) / group_size;
        return {reinterpret_cast<const char*>(weight), (outer + PANEL - 1) / PANEL, rows(inner, group_size) * ROW_BYTES + groups * NUMBERS_BYTES};
    }
    Panels panels(const Tiles&, const Rounded& inputs) const { return panels(inputs.inner, inputs.group_size); }

    template <int T>
    __attribute__((noinline)) void multiply_tile(const uint8_t* place, int64_t first, const Rounded& inputs, float* out, Fetched fetched) const {
        const int32_t* lanes = inputs.lanes + first * inputs.num_lanes;
        const float *scales = inputs.scales + first * inputs.groups, *input_sums = inputs.sums + first * inputs.groups;
        Vector totals[T][2];
        for (int t = 0; t < T; ++t) totals[t][0] = totals[t][1] = splat(0.0f);
        for (int64_t g = 0; g < inputs.groups; ++g) {
            int64_t rows = Span(g, inputs.group_size, inputs.inner).filled / Codes::ROW_INPUTS;
            const uint16_t* const numbers = reinterpret_cast<const uint16_t*>(place + rows * ROW_BYTES);
            Vector scale[2];
            load_two(numbers, scale[0], scale[1]);
            while (rows > 0) {
                typename Codes::Sums sums[T][2] = {};
                const int64_t some = std::min(rows, Codes::MOST_ROWS);
                for (int64_t row = 0; row < some; ++row) {
                    fetch_ahead(place, fetched);
                    for (int part = 0; part < Codes::PARTS; ++part) {
                        typename Codes::Part one, two;
                        Codes::load(place, part, one, two);
                        for (int t = 0; t < T; ++t) {
                            const Integers x = Integers{} + lanes[t];
                            sums[t][0] = Codes::add(sums[t][0], one, x);
                            sums[t][1] = Codes::add(sums[t][1], two, x);
                        }
                        lanes += T;
                    }
                    place += ROW_BYTES;
                }
                for (int t = 0; t < T; ++t)
                    for (int half = 0; half < 2; ++half) {
                        const Vector sum = __builtin_convertvector(Codes::total(sums[t][half]), Vector);
                        totals[t][half] = fma(sum, scale[half] * splat(scales[g * T + t]), totals[t][half]);
                    }
                rows -= some;
            }
            if constexpr (Codes::NUMBERS == 2) {
                Vector minimum[2];
                load_two(numbers + PANEL, minimum[0], minimum[1]);
                for (int t = 0; t < T; ++t)
                    for (int half = 0; half < 2; ++half)
                        totals[t][half] = fma(splat(input_sums[g * T + t]), minimum[half], totals[t][half]);
            }
            place += NUMBERS_BYTES;
        }
        for (int t = 0; t < T; ++t)
            for (int half = 0; half < 2; ++half) put(totals[t][half], out + t * PANEL + half * LANES);
    }

    void multiply(const Tiles& tiles, int64_t panel, int64_t tile, bool, const Rounded& inputs, float* out, const Ahead& ahead) const {
        const int64_t first = tiles.start(tile);
        const uint8_t* const own = weight + panel * panels(tiles, inputs).bytes;
        const Fetched fetched = part_of(ahead, rows(inputs.inner, inputs.group_size), tiles, tile);
        with_tokens(tiles.start(tile + 1) - first, [&](auto count, auto) { multiply_tile<count>(own, first, inputs, out, fetched); });
    }
};

}  // namespace
}  // namespace shardwright
