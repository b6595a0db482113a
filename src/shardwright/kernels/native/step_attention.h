// Attention of a whole step: sequences with one query each, and with several.

#pragma once

#include "attention.h"

namespace shardwright {

// query [T, H, key_dim], output [T, H, value_dim], contiguous; keys and values as the cache holds them, with this step's. T is float, or
// uint16_t of bfloat16.
template <typename T>
void attend(const Shape& shape, const Sequences& step, const T* query, const T* keys, const T* values, const Extras& extras, T* output);

}  // namespace shardwright
