// Linears with packed weights; see kernels/packed_linear.py.

#include "packed_codes.h"

namespace {

// make(tiles, arranged inputs) gives the weight.
template <typename X, typename Make>
void linear(const X* input, const float* bias, X* output, int64_t tokens, int64_t inner, Make make) {
    lead([&] {
        const Tiles tiles(tokens);
        const float* arranged = arrange(tiles, inner, [&](int64_t token, float* row) {
            for (int64_t k = 0; k < inner; ++k) row[k] = widen(input[token * inner + k]);
        });
        const auto product = make(tiles, arranged);
        multiply(tiles, arranged, inner, &product, 1, [&](int, int64_t token, int64_t feature, int64_t count, float* sums) {
            X* to = output + token * product.outer + feature;
            for (int64_t i = 0; i < count; ++i) store(bias ? sums[i] + bias[feature + i] : sums[i], to + i);
        });
    });
}

template <typename W>
void pack(const W* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, W* packed) {
    const int64_t panels = (outer + PANEL - 1) / PANEL;
    lead([&] {
        share(panels, true, [&](int64_t p) {
            pack_panel(weight + p * PANEL * outer_stride, outer_stride, inner_stride, std::min<int64_t>(PANEL, outer - p * PANEL), inner,
                       packed + p * inner * PANEL);
        });
    });
}

}  // namespace

extern "C" int64_t panel_features() { return PANEL; }

// is_half: bfloat16 instead of float32.
extern "C" void pack_weight(int64_t is_half, const void* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner,
                            void* packed) {
    if (is_half) pack(static_cast<const uint16_t*>(weight), outer_stride, inner_stride, outer, inner, static_cast<uint16_t*>(packed));
    else pack(static_cast<const float*>(weight), outer_stride, inner_stride, outer, inner, static_cast<float*>(packed));
}

// input [tokens, inner] and output [tokens, outer] of the same type, contiguous; bias [outer] float32 or null.
extern "C" void packed_linear(int64_t is_half_weight, int64_t is_half, const void* input, const void* weight, const float* bias, void* output,
                              int64_t tokens, int64_t inner, int64_t outer) {
    const auto typed = [&](auto* w, auto* x) {
        using W = std::remove_pointer_t<decltype(w)>;
        using X = std::remove_pointer_t<decltype(x)>;
        linear(static_cast<const X*>(input), bias, static_cast<X*>(output), tokens, inner,
               [&](const Tiles&, const float*) { return Product<W>{static_cast<const W*>(weight), outer}; });
    };
    uint16_t* half = nullptr;
    float* whole = nullptr;
    if (is_half_weight) is_half ? typed(half, half) : typed(half, whole);
    else is_half ? typed(whole, half) : typed(whole, whole);
}

// As packed_linear, for a weight of codes of 8 or 4 bits; minimums may be null.
extern "C" void coded_linear(int64_t bits, int64_t is_half, const void* input, const uint8_t* codes, const uint16_t* scales,
                             const uint16_t* minimums, int64_t group_size, const float* bias, void* output, int64_t tokens, int64_t inner,
                             int64_t outer) {
    const auto typed = [&](auto code, auto* x) {
        using X = std::remove_pointer_t<decltype(x)>;
        linear(static_cast<const X*>(input), bias, static_cast<X*>(output), tokens, inner, [&](const Tiles& tiles, const float* arranged) {
            const float* sums = minimums ? sum_groups(tiles, arranged, inner, group_size) : nullptr;
            return Coded<decltype(code)>{codes, scales, minimums, outer, group_size, sums};
        });
    };
    uint16_t* half = nullptr;
    float* whole = nullptr;
    if (bits == 8) is_half ? typed(Int8(), half) : typed(Int8(), whole);
    else is_half ? typed(Int4(), half) : typed(Int4(), whole);
}
