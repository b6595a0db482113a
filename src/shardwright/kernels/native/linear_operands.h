// How products come by what instructions name: inputs, and places for what comes out.

#pragma once

#include "linears.h"
#include "packed.h"

namespace shardwright {
namespace {

// Inputs as `arrange` and `round_inputs` read them.
inline auto inputs_of(const Instruction& in) {
    return [&x = in.tensor[1]](int64_t token, int64_t first, int64_t last, float* row) {
        load_row(x.data + (token * x.stride[0] + first * x.stride[1]) * bytes(x.type), x.type, x.stride[1], last - first, row);
    };
}

template <typename P, typename Inputs>
void multiply(const Instruction* instructions, int count, const Tiles& tiles, const Inputs& inputs, const Reading* reading) {
    P products[MOST_JOINED];
    for (int i = 0; i < count; ++i)
        products[i] = {reinterpret_cast<decltype(P::weight)>(instructions[i].tensor[2].data), instructions[i].tensor[0].size[1]};
    multiply(tiles, inputs, products, count, [&](int number, int64_t token, int64_t tokens, int64_t feature, int64_t features, float* sums) {
        const View &out = instructions[number].tensor[0], &bias = instructions[number].tensor[3];
        const bool is_whole = features == PANEL && out.stride[1] == 1;
        const int64_t step = out.stride[0] * bytes(out.type);
        char* to = out.data + token * step + feature * out.stride[1] * bytes(out.type);
        for (int64_t t = 0; t < tokens; ++t, sums += PANEL, to += step) {
            if (bias.data)
                for (int64_t i = 0; i < features; ++i) sums[i] += reinterpret_cast<const float*>(bias.data)[feature + i];
            if (is_whole) store_row(sums, PANEL, to, out.type, 1);
            else store_row(sums, features, to, out.type, out.stride[1]);
        }
    }, reading);
}

}  // namespace
}  // namespace shardwright
