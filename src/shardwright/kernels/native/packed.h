// Products with packed weights, bfloat16 or float32, for any number of tokens. A weight [outer, inner] is kept as panels of PANEL output
// features, each [inner, PANEL]: it is read once and in order, a vector of features at a time, and every input feature is spread over a
// vector. So sums need no adding up across lanes, and stay in registers over the whole of a panel. Sums are float32.
// The layout is that of BLIS (Van Zee and van de Geijn, 2015). Included by what offers it; see kernels/packed_linear.py for shapes.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "stream.h"
#include "vector.h"

// Tokens at once: as many sums as fill the registers.
#if defined(__AVX512BW__) || defined(__aarch64__)
#define TILE 12
#else
#define TILE 6
#endif

namespace shardwright {
namespace {

constexpr int PANEL = 2 * LANES;
// Bytes between what is read and what is fetched to the nearest cache, where each number is read once; and to the second one: there many
// more lines can be on their way.
constexpr int64_t AHEAD = 2048, FAR_AHEAD = 8192;
constexpr int64_t FETCHING = 4;            // tiles that fetch the next panel
constexpr int64_t ARRANGED = 256;          // features of a token at once
constexpr int64_t WORTH_ARRANGING = 1 << 12;  // by more than one thread

typedef uint8_t Bytes __attribute__((vector_size(PANEL * 2)));
typedef uint16_t Bits16 __attribute__((vector_size(PANEL * 2)));

// Where feature i of a panel lies in its row: so that load_two gives features 0 to LANES - 1 first.
inline int64_t lane_of(const float*, int64_t i) { return i; }
inline int64_t lane_of(const uint16_t*, int64_t i) { return i < LANES ? 2 * i : 2 * (i - LANES) + 1; }

// One panel: `count` features of `inner` numbers; the rest of the panel is 0.
template <typename W>
void pack_panel(const W* weight, int64_t outer_stride, int64_t inner_stride, int64_t count, int64_t inner, W* panel) {
    if (count < PANEL) std::fill(panel, panel + inner * PANEL, W(0));
    constexpr int64_t RUN = 32;  // inner features at once: few enough for their rows to stay in the cache
    for (int64_t start = 0; start < inner; start += RUN) {
        const int64_t end = std::min(start + RUN, inner);
        for (int64_t i = 0; i < count; ++i) {
            const W* from = weight + i * outer_stride;
            W* to = panel + lane_of(weight, i);
            for (int64_t k = start; k < end; ++k) to[k * PANEL] = from[k * inner_stride];
        }
    }
}

// What is fetched beside reading a panel, so many bytes further for each of its rows.
struct Fetched {
    const char* from;
    int64_t step;
};

// To the nearest cache what is read soon after `place`; to the second one the next part of what is read later.
inline void fetch_ahead(const void* place, Fetched& fetched) {
    __builtin_prefetch(static_cast<const char*>(place) + AHEAD);
    __builtin_prefetch(fetched.from, 0, 2);
    fetched.from += fetched.step;
}

// What follows soon after what is read now.
template <typename W>
Fetched ahead_of(const W* weight) {
    return {reinterpret_cast<const char*>(weight) + FAR_AHEAD, PANEL * sizeof(W)};
}

// Chains of sums, added up, to rows of `out`.
template <int CHAINS, int T>
__attribute__((always_inline)) inline void put_sums(const Vector (&sums)[CHAINS][T][2], float* out, int64_t out_stride) {
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) {
            Vector total = sums[0][t][half];
            for (int c = 1; c < CHAINS; ++c) total = plus(total, sums[c][t][half]);
            put(total, out + t * out_stride + half * LANES);
        }
}

// T tokens by a panel, to sums [T, PANEL] whose rows are `out_stride` apart. The tokens are [inner, T], or IN_ROWS: rows that are
// `token_stride` apart. CHAINS sums for each hide latency where there are few. Never inlined: among other code the compiler runs out of
// registers.
template <int T, int CHAINS, bool IN_ROWS, typename W>
__attribute__((noinline)) void multiply_tile(const W* weight, const float* input, int64_t token_stride, int64_t inner, float* out,
                                             int64_t out_stride, Fetched fetched) {
    Vector sums[CHAINS][T][2];
    for (int c = 0; c < CHAINS; ++c)
        for (int t = 0; t < T; ++t)
            for (int half = 0; half < 2; ++half) sums[c][t][half] = splat(0.0f);
    const auto step = [&](int c) __attribute__((always_inline)) {
        Vector first, second;
        load_two(weight, first, second);
        fetch_ahead(weight, fetched);
        for (int t = 0; t < T; ++t) {
            const Vector x = splat(input[IN_ROWS ? t * token_stride : t]);
            sums[c][t][0] = fma(first, x, sums[c][t][0]);
            sums[c][t][1] = fma(second, x, sums[c][t][1]);
        }
        weight += PANEL;
        input += IN_ROWS ? 1 : T;
    };
    int64_t k = 0;
#pragma GCC unroll 2
    for (; k + CHAINS <= inner; k += CHAINS)
        for (int c = 0; c < CHAINS; ++c) step(c);
    for (; k < inner; ++k) step(0);
    put_sums(sums, out, out_stride);
}

// Calls f(number of tokens, chains) with both known to the compiler.
template <typename F>
void with_tokens(int64_t tokens, F f) {
    const auto call = [&](auto count) { f(count, std::integral_constant<int, count == 1 ? 4 : count == 2 ? 2 : 1>()); };
    switch (tokens) {
        case 1: return call(std::integral_constant<int, 1>());
        case 2: return call(std::integral_constant<int, 2>());
        case 3: return call(std::integral_constant<int, 3>());
        case 4: return call(std::integral_constant<int, 4>());
        case 5: return call(std::integral_constant<int, 5>());
        case 6: return call(std::integral_constant<int, 6>());
#if TILE > 6
        case 7: return call(std::integral_constant<int, 7>());
        case 8: return call(std::integral_constant<int, 8>());
        case 9: return call(std::integral_constant<int, 9>());
        case 10: return call(std::integral_constant<int, 10>());
        case 11: return call(std::integral_constant<int, 11>());
        case 12: return call(std::integral_constant<int, 12>());
#endif
    }
}

// Tokens [inner, tokens].
template <typename W>
void multiply_tile(int64_t tokens, const W* weight, const float* input, int64_t inner, float* out, int64_t out_stride, Fetched fetched) {
    with_tokens(tokens, [&](auto count, auto chains) {
        multiply_tile<count, chains, false>(weight, input, 0, inner, out, out_stride, fetched);
    });
}

// Tokens [tokens, inner].
template <typename W>
void multiply_rows(int64_t tokens, const W* weight, const float* input, int64_t token_stride, int64_t inner, float* out) {
    with_tokens(tokens, [&](auto count, auto chains) {
        multiply_tile<count, chains, true>(weight, input, token_stride, inner, out, PANEL, ahead_of(weight));
    });
}

// Tokens cut into whole tiles and a rest: that is faster than tiles as even as can be, which all leave registers unused.
struct Tiles {
    int64_t tokens, count;
    explicit Tiles(int64_t tokens) : tokens(tokens), count((tokens + TILE - 1) / TILE) {}
    int64_t start(int64_t tile) const { return std::min<int64_t>(tile * TILE, tokens); }
};

// Tokens in the order in which tiles read them: each tile [inner, its tokens].
struct Arranged {
    const float* data;
    int64_t inner;
};

// The first `length` numbers of each of `count` rows, `stride` apart and with room for whole vectors, become [length, count]. Numbers are
// float32, or whatever else has 32 bits.
template <typename N>
void interleave_rows(const N* rows, int64_t stride, int64_t count, int64_t length, N* to) {
    static_assert(sizeof(N) == sizeof(float));
    float block[LANES * PANEL + LANES];
    if (count == 1) return void(std::memcpy(to, rows, length * sizeof(N)));
    for (int64_t k = 0; k < length; k += LANES) {
        for (int64_t first = (count - 1) / LANES * LANES; first >= 0; first -= LANES) {  // what goes beyond `count` is written over afterwards
            Vector square[LANES];
            for (int i = 0; i < LANES; ++i) {
                square[i] = splat(0.0f);
                if (first + i < count) std::memcpy(&square[i], rows + (first + i) * stride + k, sizeof square[i]);
            }
            transpose(square);
            for (int i = 0; i < LANES; ++i) put(square[i], block + i * count + first);
        }
        std::memcpy(to + k * count, block, std::min<int64_t>(LANES, length - k) * count * sizeof(N));
    }
}

// read(token, first, last, row) brings some of one token's features.
template <typename Read>
Arranged arrange(const Tiles& tiles, int64_t inner, Read read) {
    thread_local std::vector<float> arranged;
    arranged.resize(tiles.tokens * inner);
    float* const all = arranged.data();
    const int64_t runs = (inner + ARRANGED - 1) / ARRANGED;
    share(tiles.count * runs, tiles.tokens * inner >= WORTH_ARRANGING, [&](int64_t task) {
        alignas(64) float rows[TILE * ARRANGED];
        const int64_t tile = task / runs, begin = task % runs * ARRANGED, end = std::min(begin + ARRANGED, inner);
        const int64_t first = tiles.start(tile), count = tiles.start(tile + 1) - first;
        float* const to = all + first * inner + begin * count;
        if (count == 1) return read(first, begin, end, to);
        for (int64_t t = 0; t < count; ++t) read(first + t, begin, end, rows + t * ARRANGED);
        interleave_rows(rows, ARRANGED, count, end - begin, to);
    });
    return {all, inner};
}

// A panel that several tiles read one after another comes from memory for the first alone. Each of them, or of the first ones, fetches its
// part of what is ahead, in as many steps, so that memory is not idle.
inline Fetched part_of(const Ahead& ahead, int64_t steps, const Tiles& tiles, int64_t tile) {
    const int64_t first = tiles.start(tile), tokens = tiles.start(tile + 1) - first;
    const int64_t fetching = std::min<int64_t>(tiles.tokens, FETCHING * TILE), all_steps = fetching * steps;
    if (first >= fetching || steps == 0) return {ahead.from, 0};
    return {ahead.from + ahead.bytes * first / fetching, (ahead.bytes * tokens + all_steps - 1) / all_steps};
}

// A packed weight.
template <typename W>
struct Product {
    static constexpr int64_t LEAST_TILES = 1;
    const W* weight;
    int64_t outer;
    Panels panels(int64_t inner) const {
        return {reinterpret_cast<const char*>(weight), (outer + PANEL - 1) / PANEL, inner * PANEL * static_cast<int64_t>(sizeof(W))};
    }
    Panels panels(const Tiles&, const Arranged& inputs) const { return panels(inputs.inner); }
    void multiply(const Tiles& tiles, int64_t panel, int64_t tile, bool, const Arranged& inputs, float* sums, const Ahead& ahead) const {
        const int64_t first = tiles.start(tile), tokens = tiles.start(tile + 1) - first;
        const W* const own = weight + panel * inputs.inner * PANEL;
        multiply_tile(tokens, own, inputs.data + first * inputs.inner, inputs.inner, sums, PANEL, part_of(ahead, inputs.inner, tiles, tile));
    }
};

// Products of the same tokens with several weights, cut among threads as one. emit(product, first token, tokens, first feature, features,
// sums) takes what comes out: neighbouring features of some tokens, in rows of PANEL that it may change. A product is told which is the first
// of the tiles that a thread multiplies one after another by the same panel; at least LEAST_TILES, if there are as many. `reading` is that of
// the weights in a step that reads others before and after.
template <typename P, typename Inputs, typename Emit>
void multiply(const Tiles& tiles, const Inputs& inputs, const P* products, int num_products, Emit emit, const Reading* reading = nullptr) {
    int64_t panels = 0;
    for (int p = 0; p < num_products; ++p) panels += (products[p].outer + PANEL - 1) / PANEL;
    const int64_t tile_bytes = std::max<int64_t>(inputs.inner * TILE * sizeof(float), 1), most = std::max<int64_t>(1, block_bytes() / tile_bytes);
    const int64_t blocks = std::max<int64_t>(1, std::min(tiles.count / P::LEAST_TILES, (tiles.count + most - 1) / most));
    share(blocks * panels, true, [&](int64_t i) {
        const int64_t first_tile = i / panels * tiles.count / blocks, last_tile = (i / panels + 1) * tiles.count / blocks;
        int64_t panel = i % panels;
        int number = 0;
        for (int64_t own; panel >= (own = (products[number].outer + PANEL - 1) / PANEL); ++number) panel -= own;
        const P& product = products[number];
        const int64_t feature = panel * PANEL, count = std::min<int64_t>(PANEL, product.outer - feature);
        const Panels all = product.panels(tiles, inputs);
        const int64_t least = tiles.count == 1 ? FAR_AHEAD : all.bytes;
        const bool is_streamed = reading && blocks == 1 && all.bytes > 0;
        const Ahead ahead = is_streamed ? own_stream().beside(*reading, i, number, panel, least)
                                        : Ahead{all.data + panel * all.bytes + least, all.bytes};
        alignas(64) float sums[TILE * PANEL];
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
            const int64_t first = tiles.start(tile), tokens = tiles.start(tile + 1) - first;
            product.multiply(tiles, panel, tile, tile == first_tile, inputs, sums, ahead);
            emit(number, first, tokens, feature, count, sums);
        }
    });
}

}  // namespace
}  // namespace shardwright
