// Products with weights of float32, of bfloat16, and of bfloat16 in 12 bits.

#include "linears.h"

#include "compact.h"
#include "linear_operands.h"

namespace shardwright {

void linears(const Instruction* instructions, int count, const Reading* reading) {
    if (has_codes(*instructions)) return coded_linears(instructions, count, reading);
    const View &x = instructions->tensor[1], &weight = instructions->tensor[2];
    const Tiles tiles(x.size[0]);
    const Arranged inputs = arrange(tiles, x.size[1], inputs_of(*instructions));
    if (weight.type == U8) multiply<CompactProduct>(instructions, count, tiles, inputs, reading);
    else if (weight.type == BF16) multiply<Product<uint16_t>>(instructions, count, tiles, inputs, reading);
    else multiply<Product<float>>(instructions, count, tiles, inputs, reading);
}

Panels panels_of(const Instruction& in) {
    if (has_codes(in)) return coded_panels_of(in);
    const int64_t tokens = in.tensor[1].size[0], inner = in.tensor[1].size[1], outer = in.tensor[0].size[1];
    uint8_t* const weight = reinterpret_cast<uint8_t*>(in.tensor[2].data);
    if (in.tensor[2].type == U8) return CompactProduct{weight, outer}.panels(inner, tokens);
    if (in.tensor[2].type == BF16) return Product<uint16_t>{reinterpret_cast<const uint16_t*>(weight), outer}.panels(inner);
    return Product<float>{reinterpret_cast<const float*>(weight), outer}.panels(inner);
}

}  // namespace shardwright
