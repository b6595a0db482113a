// Packed weights, and linears with them as functions of their own; see kernels/packed_linear.py.

#include "compact.h"
#include "exported.h"
#include "linears.h"

namespace shardwright {
namespace {

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

// [rows, columns], contiguous.
View matrix(const void* data, Type type, int64_t rows, int64_t columns) {
    return {const_cast<char*>(static_cast<const char*>(data)), type, 2, {rows, columns}, {columns, 1}};
}

}  // namespace
}  // namespace shardwright

using namespace shardwright;

EXPORTED int64_t panel_features() { return PANEL; }

// is_half: bfloat16 instead of float32.
EXPORTED void pack_weight(int64_t is_half, const void* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner,
                          void* packed) {
    if (is_half) pack(static_cast<const uint16_t*>(weight), outer_stride, inner_stride, outer, inner, static_cast<uint16_t*>(packed));
    else pack(static_cast<const float*>(weight), outer_stride, inner_stride, outer, inner, static_cast<float*>(packed));
}

EXPORTED int64_t compact_bytes(int64_t outer, int64_t inner) { return Compact::bytes(outer, inner); }

// Returns whether the weight, of bfloat16, fits.
EXPORTED int64_t pack_compact(const uint16_t* weight, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, uint8_t* packed) {
    return compress(weight, outer_stride, inner_stride, outer, inner, packed);
}

// Keeps a weight unpacked too, as pack_weight makes it, so many bytes behind it. One thread does that, while others may multiply.
EXPORTED void keep_unpacked(uint8_t* packed, int64_t outer, int64_t inner, int64_t distance) {
    unpack(Compact::of(packed, outer, inner), distance);
}

// input [tokens, inner] and output [tokens, outer] of the same type, contiguous; bias [outer] float32 or null. The weight has numbers of 32,
// 16 or 12 bits, of which unpacked ones may be kept beside it, or codes of 8 or 4 bits.
EXPORTED void packed_linear(int64_t weight_bits, int64_t group_size, int64_t is_half, const void* input, const void* weight, const float* bias,
                            void* output, int64_t tokens, int64_t inner, int64_t outer) {
    const Type type = is_half ? BF16 : F32, weight_type = weight_bits == 32 ? F32 : weight_bits == 16 ? BF16 : U8;
    Instruction in{};
    in.operation = LINEAR;
    in.value[1] = group_size;
    in.value[2] = weight_bits <= 8 ? weight_bits : 0;
    in.tensor[0] = matrix(output, type, tokens, outer);
    in.tensor[1] = matrix(input, type, tokens, inner);
    in.tensor[2] = matrix(weight, weight_type, outer, inner);
    in.tensor[3] = matrix(bias, F32, 1, outer);
    lead([&] { linears(&in, 1, nullptr); });
}
