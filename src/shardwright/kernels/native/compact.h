// Products with weights of bfloat16 that are kept in 12 bits, without loss. Exponents of a trained weight lie close together: of the 8 bits
// of each, the upper 7 are kept as 3, their distance from what is 7 below the largest of the panel (DFloat11 of Zhang et al., 2025, codes
// exponents by their frequency; a fixed length is decoded by vectors). What lies too far below the largest of its panel, a few weights of
// 10,000, is kept apart, whole.
//
// A panel is a table of upper bytes, by sign and distance, and groups of four input features: the lower bytes of all, then a half byte for
// each upper one. Behind the panels stand how far away the unpacked weight begins, where those kept apart begin for each panel, and those
// kept apart.
//
// A few tokens are multiplied as a panel is read, unpacked in registers: three quarters of the time that reading all bits takes, where memory
// is what takes it. For more a panel is unpacked, which costs as much as multiplying one more, for some tiles at once, unless all of it is
// kept unpacked beside.

#pragma once

#include "packed.h"

namespace shardwright {
namespace {

constexpr int64_t GROUP = 4;  // input features; a weight has a multiple of it
constexpr int64_t GROUP_BYTES = GROUP * PANEL * 3 / 2;
constexpr int64_t GROUP_LINES = (GROUP_BYTES + LINE - 1) / LINE;
constexpr int64_t TABLE_BYTES = PANEL * 2;
constexpr int64_t LANE = 16;                            // bytes that vectors of 128 bits look up and interleave among themselves
constexpr int MOST_STRAIGHT = TILE > 6 ? TILE : 4;      // tokens that are multiplied as a panel is read: their sums leave registers for that
constexpr int64_t ELEMENTS_PER_APART = 256;             // one more that is kept apart, and the weight is not worth it

// A weight that is kept apart: input feature * PANEL + output feature within its panel.
struct Apart {
    uint32_t place;
    float value;
};

// Where the parts of a weight are.
struct Compact {
    int64_t inner, panels;
    uint8_t* weight;

    static Compact of(uint8_t* weight, int64_t outer, int64_t inner) { return {inner, (outer + PANEL - 1) / PANEL, weight}; }
    static int64_t panel_bytes(int64_t inner) { return TABLE_BYTES + inner / GROUP * GROUP_BYTES; }
    static int64_t room_apart(int64_t outer, int64_t inner) { return outer * inner / ELEMENTS_PER_APART; }
    static int64_t bytes(int64_t outer, int64_t inner) {
        const int64_t panels = (outer + PANEL - 1) / PANEL;
        return panels * panel_bytes(inner) + (panels + 2) * 8 + room_apart(outer, inner) * 8;
    }

    uint8_t* panel(int64_t number) const { return weight + number * panel_bytes(inner); }
    int64_t* offset() const { return reinterpret_cast<int64_t*>(panel(panels)); }
    // Null: it is not kept unpacked, or not yet.
    const uint16_t* unpacked() const {
        const int64_t distance = __atomic_load_n(offset(), __ATOMIC_ACQUIRE);
        return distance ? reinterpret_cast<const uint16_t*>(weight + distance) : nullptr;
    }
    int64_t* starts() const { return offset() + 1; }
    Apart* apart(int64_t number) const { return reinterpret_cast<Apart*>(starts() + panels + 1) + starts()[number]; }
};
static_assert(sizeof(Apart) == 8);

template <typename B>
inline B read(const void* place) {
    B vector;
    std::memcpy(&vector, place, sizeof vector);
    return vector;
}

inline Bytes look_up(Bytes table, Bytes index) {
#if defined(__AVX512BW__)
    return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#elif defined(__aarch64__)
    return (Bytes)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
    Bytes found{};
    for (int i = 0; i < 2 * PANEL; ++i) found[i] = table[index[i]];
    return found;
#endif
}

// Words of the lower and upper bytes in the first and in the second half of each lane; and back.
inline void interleave(Bytes low, Bytes high, Bits16& first, Bits16& second) {
#if defined(__AVX512BW__)
    first = (Bits16)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
    second = (Bits16)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high);
#elif defined(__AVX2__) && defined(__FMA__)
    first = (Bits16)_mm256_unpacklo_epi8((__m256i)low, (__m256i)high);
    second = (Bits16)_mm256_unpackhi_epi8((__m256i)low, (__m256i)high);
#elif defined(__aarch64__)
    first = (Bits16)vzip1q_u8((uint8x16_t)low, (uint8x16_t)high);
    second = (Bits16)vzip2q_u8((uint8x16_t)low, (uint8x16_t)high);
#else
    uint16_t words[2][PANEL];
    for (int i = 0; i < PANEL; ++i)
        for (int half = 0; half < 2; ++half) {
            const int place = i / 8 * LANE + half * 8 + i % 8;
            words[half][i] = static_cast<uint16_t>(low[place] | high[place] << 8);
        }
    first = read<Bits16>(words[0]);
    second = read<Bits16>(words[1]);
#endif
}

inline void take_apart(Bits16 first, Bits16 second, Bytes& low, Bytes& high) {
#if defined(__AVX512BW__)
    low = (Bytes)_mm512_packus_epi16((__m512i)(first & 255), (__m512i)(second & 255));
    high = (Bytes)_mm512_packus_epi16((__m512i)(first >> 8), (__m512i)(second >> 8));
#elif defined(__AVX2__) && defined(__FMA__)
    low = (Bytes)_mm256_packus_epi16((__m256i)(first & 255), (__m256i)(second & 255));
    high = (Bytes)_mm256_packus_epi16((__m256i)(first >> 8), (__m256i)(second >> 8));
#elif defined(__aarch64__)
    low = (Bytes)vuzp1q_u8((uint8x16_t)first, (uint8x16_t)second);
    high = (Bytes)vuzp2q_u8((uint8x16_t)first, (uint8x16_t)second);
#else
    low = high = Bytes{};
    for (int i = 0; i < PANEL; ++i) {
        const int place = i / 8 * LANE + i % 8;
        low[place] = static_cast<uint8_t>(first[i]);
        high[place] = static_cast<uint8_t>(first[i] >> 8);
        low[place + 8] = static_cast<uint8_t>(second[i]);
        high[place + 8] = static_cast<uint8_t>(second[i] >> 8);
    }
#endif
}

__attribute__((always_inline)) inline void unpack_group(const uint8_t* group, Bytes table, Bits16 rows[GROUP]) {
    const Bytes codes = read<Bytes>(group + 4 * PANEL);
    interleave(read<Bytes>(group), look_up(table, codes & 15), rows[0], rows[1]);
    interleave(read<Bytes>(group + 2 * PANEL), look_up(table, (Bytes)((Bits16)codes >> 4) & 15), rows[2], rows[3]);
}

// A panel as `pack_panel` makes it, with what is kept apart of it.
inline void unpack_panel(const uint8_t* panel, int64_t inner, const Apart* apart, const Apart* end, uint16_t* rows) {
    const Bytes table = read<Bytes>(panel);
    const uint8_t* group = panel + TABLE_BYTES;
    uint16_t* to = rows;
    for (int64_t k = 0; k < inner; k += GROUP, group += GROUP_BYTES, to += GROUP * PANEL) {
        Bits16 some[GROUP];
        unpack_group(group, table, some);
#pragma GCC unroll 4
        for (int row = 0; row < GROUP; ++row) std::memcpy(to + row * PANEL, &some[row], sizeof some[row]);
    }
    for (; apart < end; ++apart) rows[apart->place / PANEL * PANEL + lane_of(rows, apart->place % PANEL)] = narrow_rounded(apart->value);
}

// T tokens [inner, T] by a panel, as it is read.
template <int T, int CHAINS>
__attribute__((noinline)) void multiply_straight(const uint8_t* panel, const Apart* apart, const Apart* end, const float* input, int64_t inner,
                                                 float* out, Fetched fetched) {
    const Bytes table = read<Bytes>(panel);
    const uint8_t* group = panel + TABLE_BYTES;
    const float* x = input;
    Vector sums[CHAINS][T][2];
    for (int c = 0; c < CHAINS; ++c)
        for (int t = 0; t < T; ++t) sums[c][t][0] = sums[c][t][1] = splat(0.0f);
    for (int64_t k = 0; k < inner; k += GROUP) {
        Bits16 rows[GROUP];
        unpack_group(group, table, rows);
        for (int64_t line = 0; line < GROUP_LINES; ++line) fetch_ahead(group + line * LINE, fetched);
        group += GROUP_BYTES;
        for (int row = 0; row < GROUP; ++row) {
            Vector first, second;
            widen_two((Bits)rows[row], first, second);
            for (int t = 0; t < T; ++t) {
                const Vector spread = splat(*x++);
                sums[row % CHAINS][t][0] = fma(first, spread, sums[row % CHAINS][t][0]);
                sums[row % CHAINS][t][1] = fma(second, spread, sums[row % CHAINS][t][1]);
            }
        }
    }
    put_sums(sums, out, PANEL);
    for (; apart < end; ++apart)
        for (int t = 0; t < T; ++t) {
            float& sum = out[t * PANEL + apart->place % PANEL];
            sum = fused(apart->value, input[apart->place / PANEL * T + t], sum);
        }
}

// A packed weight of bfloat16 in 12 bits.
struct CompactProduct {
    static constexpr int64_t LEAST_TILES = 4;
    uint8_t* weight;
    int64_t outer;

    // Where tokens read a weight that is kept unpacked beside it, those of that.
    Panels panels(int64_t inner, int64_t tokens) const {
        const Compact all = Compact::of(weight, outer, inner);
        if (const uint16_t* unpacked = unpacked_for(all, tokens)) return Product<uint16_t>{unpacked, outer}.panels(inner);
        return {reinterpret_cast<const char*>(weight), all.panels, Compact::panel_bytes(inner)};
    }
    Panels panels(const Tiles& tiles, const Arranged& inputs) const { return panels(inputs.inner, tiles.tokens); }
    void multiply(const Tiles& tiles, int64_t panel, int64_t tile, bool is_first, const Arranged& inputs, float* sums, const Ahead& ahead) const {
        const Compact all = Compact::of(weight, outer, inputs.inner);
        if (const uint16_t* unpacked = unpacked_for(all, tiles.tokens))
            return Product<uint16_t>{unpacked, outer}.multiply(tiles, panel, tile, is_first, inputs, sums, ahead);
        const int64_t inner = inputs.inner, first = tiles.start(tile), tokens = tiles.start(tile + 1) - first;
        const uint8_t* const own = all.panel(panel);
        const Apart *apart = all.apart(panel), *const end = all.apart(panel + 1);
        const float* const input = inputs.data + first * inner;
        if (tiles.tokens > MOST_STRAIGHT) {
            thread_local std::vector<uint16_t> unpacked;
            uint16_t* const rows = at_line(unpacked, inner * PANEL);
            if (is_first) unpack_panel(own, inner, apart, end, rows);
            return multiply_tile(tokens, rows, input, inner, sums, PANEL, part_of(ahead, inner, tiles, tile));
        }
        with_tokens(tokens, [&](auto count, auto chains) {
            if constexpr (count <= MOST_STRAIGHT)
                multiply_straight<count, chains>(own, apart, end, input, inner, sums, part_of(ahead, inner / GROUP * GROUP_LINES, tiles, tile));
        });
    }

private:
    static const uint16_t* unpacked_for(const Compact& all, int64_t tokens) { return tokens > MOST_STRAIGHT ? all.unpacked() : nullptr; }
};

// Unpacks a weight to so many bytes behind it, where it is read from then on; others may multiply meanwhile.
inline void unpack(const Compact& all, int64_t distance) {
    uint16_t* const to = reinterpret_cast<uint16_t*>(all.weight + distance);
    for (int64_t p = 0; p < all.panels; ++p) {
        unpack_panel(all.panel(p), all.inner, all.apart(p), all.apart(p + 1), to + p * all.inner * PANEL);
    }
    __atomic_store_n(all.offset(), distance, __ATOMIC_RELEASE);
}

// A panel of rows as `pack_panel` makes them; adds what does not fit.
inline void compress_panel(const uint16_t* rows, int64_t inner, uint8_t* panel, std::vector<Apart>& apart) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < inner * PANEL; ++i) largest = std::max<uint16_t>(largest, rows[i] & 0x7fff);
    const int least = std::max((largest >> 8) - 7, 0);  // distance 0 is that of zero
    for (int i = 0; i < TABLE_BYTES; ++i) {
        const int distance = i & 7;
        panel[i] = static_cast<uint8_t>((i & 8) << 4 | (distance ? least + distance : 0));
    }
    const auto is_apart = [=](uint16_t bits) { return (bits >> 8 & 127) <= least && (bits & 0x7fff); };
    uint8_t* group = panel + TABLE_BYTES;
    for (int64_t k = 0; k < inner; k += GROUP, group += GROUP_BYTES) {
        Bytes codes[2], lost{};
        for (int half = 0; half < 2; ++half) {
            const uint16_t* const own = rows + (k + 2 * half) * PANEL;
            Bytes low, high;
            take_apart(read<Bits16>(own), read<Bits16>(own + PANEL), low, high);
            const Bytes upper = high & 127, fits = (Bytes)(upper > static_cast<uint8_t>(least));
            lost |= ~fits & (low | upper);
            low &= fits;
            std::memcpy(group + 2 * half * PANEL, &low, sizeof low);
            codes[half] = ((upper - static_cast<uint8_t>(least)) & fits) | (high >> 4 & 8);
        }
        codes[0] |= codes[1] << 4;
        std::memcpy(group + 4 * PANEL, codes, sizeof codes[0]);
        uint8_t any = 0;
        for (int i = 0; i < TABLE_BYTES; ++i) any |= lost[i];
        if (!any) continue;
        for (int64_t row = k; row < k + GROUP; ++row)
            for (int64_t feature = 0; feature < PANEL; ++feature) {
                const uint16_t bits = rows[row * PANEL + lane_of(rows, feature)];
                if (is_apart(bits)) apart.push_back({static_cast<uint32_t>(row * PANEL + feature), widen(bits)});
            }
    }
}

// Whether the weight fits; what is written is of no use if not.
inline bool compress(const uint16_t* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, uint8_t* packed) {
    const Compact all = Compact::of(packed, outer, inner);
    std::vector<std::vector<Apart>> apart(all.panels);
    lead([&] {
        share(all.panels, true, [&](int64_t p) {
            thread_local std::vector<uint16_t> rows;
            rows.resize(inner * PANEL);
            const int64_t count = std::min<int64_t>(PANEL, outer - p * PANEL);
            pack_panel(weight + p * PANEL * outer_stride, outer_stride, inner_stride, count, inner, rows.data());
            compress_panel(rows.data(), inner, packed + p * Compact::panel_bytes(inner), apart[p]);
        });
    });
    int64_t* const starts = all.starts();
    *all.offset() = 0;
    starts[0] = 0;
    for (int64_t p = 0; p < all.panels; ++p) starts[p + 1] = starts[p] + static_cast<int64_t>(apart[p].size());
    if (starts[all.panels] > Compact::room_apart(outer, inner)) return false;
    for (int64_t p = 0; p < all.panels; ++p) std::copy(apart[p].begin(), apart[p].end(), all.apart(p));
    return true;
}

}  // namespace
}  // namespace shardwright
