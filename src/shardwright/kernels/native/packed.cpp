// Linears with packed weights; see kernels/packed_linear.py.

#include "compact.h"
#include "packed_codes.h"

namespace {

// Inputs [tokens, inner] as `arrange` and `round_inputs` read them.
template <typename X>
auto rows_of(const X* input, int64_t inner) {
    return [=](int64_t token, int64_t first, int64_t last, float* row) {
        for (int64_t k = first; k < last; ++k) row[k - first] = widen(input[token * inner + k]);
    };
}

template <typename P, typename Inputs, typename X>
void linear(const Tiles& tiles, const Inputs& inputs, const P& product, const float* bias, X* output) {
    multiply(tiles, inputs, &product, 1, [&](int, int64_t token, int64_t tokens, int64_t feature, int64_t features, const float* sums) {
        for (int64_t t = 0; t < tokens; ++t, sums += PANEL) {
            X* const to = output + (token + t) * product.outer + feature;
            for (int64_t i = 0; i < features; ++i) store(bias ? sums[i] + bias[feature + i] : sums[i], to + i);
        }
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

extern "C" int64_t compact_bytes(int64_t outer, int64_t inner) { return Compact::bytes(outer, inner); }

// Returns whether the weight, of bfloat16, fits.
extern "C" int64_t pack_compact(const uint16_t* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, uint8_t* packed) {
    return compress(weight, outer_stride, inner_stride, outer, inner, packed);
}

// Keeps a weight unpacked too, as pack_weight makes it, so many bytes behind it. One thread does that, while others may multiply.
extern "C" void keep_unpacked(uint8_t* packed, int64_t outer, int64_t inner, int64_t distance) {
    unpack(Compact::of(packed, outer, inner), distance);
}

// input [tokens, inner] and output [tokens, outer] of the same type, contiguous; bias [outer] float32 or null. The weight has numbers of 32,
// 16 or 12 bits; of 12, unpacked ones may be kept beside it.
extern "C" void packed_linear(int64_t weight_bits, int64_t is_half, const void* input, void* weight, const float* bias, void* output,
                              int64_t tokens, int64_t inner, int64_t outer) {
    const auto multiply = [&](auto product) {
        const auto typed = [&](auto* x) {
            using X = std::remove_pointer_t<decltype(x)>;
            lead([&] {
                const Tiles tiles(tokens);
                const Arranged inputs = arrange(tiles, inner, rows_of(static_cast<const X*>(input), inner));
                linear(tiles, inputs, product, bias, static_cast<X*>(output));
            });
        };
        if (is_half) typed(static_cast<uint16_t*>(nullptr));
        else typed(static_cast<float*>(nullptr));
    };
    if (weight_bits == 12) multiply(CompactProduct{static_cast<uint8_t*>(weight), outer});
    else if (weight_bits == 16) multiply(Product<uint16_t>{static_cast<const uint16_t*>(weight), outer});
    else multiply(Product<float>{static_cast<const float*>(weight), outer});
}

// As packed_linear, for a weight of codes of 8 or 4 bits.
extern "C" void coded_linear(int64_t bits, int64_t is_half, const void* input, const uint8_t* panels, int64_t group_size, const float* bias,
                             void* output, int64_t tokens, int64_t inner, int64_t outer) {
    with_codes(bits, is_half, [&](auto codes) {
        using Codes = decltype(codes);
        const auto typed = [&](auto* x) {
            using X = std::remove_pointer_t<decltype(x)>;
            lead([&] {
                const Tiles tiles(tokens);
                const Rounded inputs = round_inputs<Codes>(tiles, inner, group_size, rows_of(static_cast<const X*>(input), inner));
                linear(tiles, inputs, Coded<Codes>{panels, outer}, bias, static_cast<X*>(output));
            });
        };
        if (is_half) typed(static_cast<uint16_t*>(nullptr));
        else typed(static_cast<float*>(nullptr));
    });
}
