// Products with packed weights of 8 or 4 bits, see kernels/packed_codes.py: a panel has codes [inner, PANEL] of a byte or half a byte, and for
// each group of input features a scale and perhaps a minimum. Codes are widened in registers; the scale meets the sum over a group.

#pragma once

#include "packed.h"

namespace {

struct Int8 {
    static constexpr int64_t ROW_BYTES = PANEL;
    static inline void load_two(const uint8_t* codes, Vector& first, Vector& second) {
        first = load_signed(reinterpret_cast<const int8_t*>(codes));
        second = load_signed(reinterpret_cast<const int8_t*>(codes) + LANES);
    }
};

struct Int4 {
    static constexpr int64_t ROW_BYTES = PANEL / 2;
    static inline void load_two(const uint8_t* codes, Vector& first, Vector& second) { load_halves(codes, first, second); }
};

// A packed weight of codes.
template <class Code>
struct Coded {
    const uint8_t* codes;
    const uint16_t *scales, *minimums;  // packed as bfloat16 weights [outer, groups]; minimums may be missing
    int64_t outer, group_size;
    const float* group_sums;  // of the inputs, [groups, tokens of a tile] for each tile; only where there are minimums

    template <int T, int CHAINS>
    __attribute__((noinline)) void tile(int64_t panel, const float* sums_of_groups, const float* input, int64_t inner, float* out) const {
        const int64_t groups = (inner + group_size - 1) / group_size;
        const uint8_t* row = codes + panel * inner * Code::ROW_BYTES;
        std::fill(out, out + T * PANEL, 0.0f);
        for (int64_t g = 0; g < groups; ++g) {
            Vector sums[CHAINS][T][2];
            for (int c = 0; c < CHAINS; ++c)
                for (int t = 0; t < T; ++t) sums[c][t][0] = sums[c][t][1] = splat(0.0f);
            const auto step = [&](int c) __attribute__((always_inline)) {
                Vector first, second;
                Code::load_two(row, first, second);
                if (c == 0) __builtin_prefetch(row + AHEAD);
                for (int t = 0; t < T; ++t) {
                    const Vector x = splat(input[t]);
                    sums[c][t][0] = fma(first, x, sums[c][t][0]);
                    sums[c][t][1] = fma(second, x, sums[c][t][1]);
                }
                row += Code::ROW_BYTES;
                input += T;
            };
            int64_t k = 0;
            const int64_t count = std::min(group_size, inner - g * group_size);
            for (; k + CHAINS <= count; k += CHAINS)
                for (int c = 0; c < CHAINS; ++c) step(c);
            for (; k < count; ++k) step(0);
            Vector scale[2], minimum[2] = {splat(0.0f), splat(0.0f)};
            load_two(scales + (panel * groups + g) * PANEL, scale[0], scale[1]);
            if (minimums) load_two(minimums + (panel * groups + g) * PANEL, minimum[0], minimum[1]);
            for (int t = 0; t < T; ++t)
                for (int half = 0; half < 2; ++half) {
                    float* place = out + t * PANEL + half * LANES;
                    Vector total = sums[0][t][half];
                    for (int c = 1; c < CHAINS; ++c) total = plus(total, sums[c][t][half]);
                    total = fma(total, scale[half], load(place));
                    if (minimums) total = fma(splat(sums_of_groups[g * T + t]), minimum[half], total);
                    put(total, place);
                }
        }
    }

    void multiply(int64_t panel, int64_t first, int64_t tokens, const float* input, int64_t inner, float* out) const {
        const float* own = minimums ? group_sums + first * ((inner + group_size - 1) / group_size) : nullptr;
        switch (tokens) {
            case 1: return tile<1, 4>(panel, own, input, inner, out);
            case 2: return tile<2, 2>(panel, own, input, inner, out);
            case 3: return tile<3, 2>(panel, own, input, inner, out);
            case 4: return tile<4, 1>(panel, own, input, inner, out);
            case 5: return tile<5, 1>(panel, own, input, inner, out);
            case 6: return tile<6, 1>(panel, own, input, inner, out);
            case 7: return tile<7, 1>(panel, own, input, inner, out);
            case 8: return tile<8, 1>(panel, own, input, inner, out);
            case 9: return tile<9, 1>(panel, own, input, inner, out);
            case 10: return tile<10, 1>(panel, own, input, inner, out);
            case 11: return tile<11, 1>(panel, own, input, inner, out);
            default: return tile<12, 1>(panel, own, input, inner, out);
        }
    }
};

// Sums of the inputs of each group, in the order in which `arrange` has the tokens.
inline const float* sum_groups(const Tiles& tiles, const float* arranged, int64_t inner, int64_t group_size) {
    thread_local std::vector<float> sums;
    const int64_t groups = (inner + group_size - 1) / group_size;
    sums.assign(tiles.tokens * groups, 0.0f);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t first = tiles.start(tile), count = tiles.start(tile + 1) - first;
        float* own = sums.data() + first * groups;
        for (int64_t k = 0; k < inner; ++k)
            for (int64_t t = 0; t < count; ++t) own[k / group_size * count + t] += arranged[first * inner + k * count + t];
    }
    return sums.data();
}

}  // namespace
