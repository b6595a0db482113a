// Linears with packed weights; see kernels/packed_linear.py.

#include "packed.h"

namespace {

template <typename W, typename X>
void linear(const X* input, const W* weight, const float* bias, X* output, int64_t tokens, int64_t inner, int64_t outer) {
    const Tiles tiles(tokens);
    const float* arranged = arrange(tiles, inner, [&](int64_t token, float* row) {
        for (int64_t k = 0; k < inner; ++k) row[k] = widen(input[token * inner + k]);
    });
    const Product<W> product{weight, outer};
    multiply(tiles, arranged, inner, &product, 1, [&](int, int64_t token, int64_t feature, int64_t count, float* sums) {
        X* to = output + token * outer + feature;
        for (int64_t i = 0; i < count; ++i) store(bias ? sums[i] + bias[feature + i] : sums[i], to + i);
    });
}

template <typename W>
void pack(const W* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, W* packed) {
    const int64_t panels = (outer + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
        pack_panel(weight + p * PANEL * outer_stride, outer_stride, inner_stride, std::min<int64_t>(PANEL, outer - p * PANEL), inner,
                   packed + p * inner * PANEL);
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
        linear(static_cast<decltype(x)>(input), static_cast<decltype(w)>(weight), bias,
               const_cast<std::remove_const_t<std::remove_pointer_t<decltype(x)>>*>(static_cast<decltype(x)>(output)), tokens, inner, outer);
    };
    const uint16_t* half = nullptr;
    const float* whole = nullptr;
    if (is_half_weight) is_half ? typed(half, half) : typed(half, whole);
    else is_half ? typed(whole, half) : typed(whole, whole);
}
