// Products with weights of codes.

#include "linear_operands.h"
#include "linears.h"
#include "packed_codes.h"

namespace shardwright {

void coded_linears(const Instruction* instructions, int count, const Reading* reading) {
    const View& x = instructions->tensor[1];
    const Tiles tiles(x.size[0]);
    with_codes(code_bits_of(*instructions), x.type == BF16, [&](auto codes) {
        using Codes = decltype(codes);
        const Rounded inputs = round_inputs<Codes>(tiles, x.size[1], group_size_of(*instructions), inputs_of(*instructions));
        multiply<Coded<Codes>>(instructions, count, tiles, inputs, reading);
    });
}

Panels coded_panels_of(const Instruction& in) {
    const int64_t inner = in.tensor[1].size[1], outer = in.tensor[0].size[1];
    const uint8_t* const weight = reinterpret_cast<const uint8_t*>(in.tensor[2].data);
    Panels panels{};
    with_codes(code_bits_of(in), in.tensor[1].type == BF16, [&](auto codes) {
        panels = Coded<decltype(codes)>{weight, outer}.panels(inner, group_size_of(in));
    });
    return panels;
}

}  // namespace shardwright
