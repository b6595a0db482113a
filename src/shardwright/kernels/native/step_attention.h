// Attention of a whole step: sequences with one query each, and with several.

#pragma once

#include "decode.h"
#include "prompts.h"

namespace {

// query [T, H, key_dim], output [T, H, value_dim], contiguous; keys and values as the cache holds them, with this step's.
template <typename T>
void attend(const Shape& shape, const Sequences& step, const T* query, const T* keys, const T* values, const Extras& extras, T* output) {
    const int64_t heads = shape.kv_heads * shape.group;
    bool has_prompts = false;
    for (int64_t s = 0; s < step.count; ++s) has_prompts |= step.starts[s + 1] - step.starts[s] > 1;
    share(step.count * shape.kv_heads, true, [&](int64_t i) {
        const int64_t s = i / shape.kv_heads, k = i % shape.kv_heads, token = step.starts[s], head = k * shape.group;
        if (step.starts[s + 1] - token != 1) return;
        decode_group(shape, query + (token * heads + head) * shape.key_dim, keys + k * shape.key_dim, values + k * shape.value_dim,
                     step.tables + s * step.table_stride, step.first[token], step.last[token], extras.of(shape, head),
                     output + (token * heads + head) * shape.value_dim);
    }, UNEVEN_PIECES);
    if (has_prompts) attend_prompts(shape, step, query, keys, values, extras, output);
}

}  // namespace
