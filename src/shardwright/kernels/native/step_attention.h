// Attention of a whole step: sequences with one query each, and with several.

#pragma once

#include "decode.h"
#include "prompts.h"

namespace {

// query [T, H, key_dim], output [T, H, value_dim], contiguous; keys and values as the cache holds them, with this step's.
template <typename T>
void attend(const Shape& shape, const Sequences& step, const T* query, const T* keys, const T* values, const Extras& extras, T* output) {
    const bool has_prompts = attend_decodes(shape, step, query, keys, values, extras, output);
    if (has_prompts) attend_prompts(shape, step, query, keys, values, extras, output);
}

}  // namespace
