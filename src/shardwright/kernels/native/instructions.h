// The list that a step is carried out by, as replay/instructions.py writes it: operations on tensors, and rows of these in float32.

#pragma once

#include "operations.h"

namespace shardwright {

constexpr int MOST_DIMS = 6, MOST_TENSORS = 4, MOST_VALUES = 12;

enum Type : int64_t { F32, BF16, I64, BOOL, I32, U8 };

struct View {
    char* data;
    int64_t type, dims;
    int64_t size[MOST_DIMS], stride[MOST_DIMS];  // strides in elements
};

struct Instruction {
    int64_t operation;
    int64_t value[MOST_VALUES];
    View tensor[MOST_TENSORS];  // the first is the output
};

inline int64_t bytes(int64_t type) {
    switch (type) {
        case F32: case I32: return 4;
        case BF16: return 2;
        case I64: return 8;
        default: return 1;
    }
}

inline float as_float(int64_t bits) {
    const int32_t low = static_cast<int32_t>(bits);
    float value;
    std::memcpy(&value, &low, sizeof value);
    return value;
}

template <typename T>
inline void widen_row(const T* from, int64_t stride, int64_t count, float* to) {
    if (stride == 1) for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
    else for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i * stride]);
}

inline void load_row(const char* data, int64_t type, int64_t stride, int64_t count, float* to) {
    if (type == BF16) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(data);
        if (stride == 1) for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
        else for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
    }
    else if (type == F32) widen_row(reinterpret_cast<const float*>(data), stride, count, to);
    else if (type == I64) widen_row(reinterpret_cast<const int64_t*>(data), stride, count, to);
    else if (type == I32) widen_row(reinterpret_cast<const int32_t*>(data), stride, count, to);
    else widen_row(reinterpret_cast<const uint8_t*>(data), stride, count, to);
}

inline void store_row(const float* from, int64_t count, char* data, int64_t type, int64_t stride) {
    if (type == BF16) {
        uint16_t* to = reinterpret_cast<uint16_t*>(data);
        if (stride == 1) for (int64_t i = 0; i < count; ++i) to[i] = narrow(from[i]);
        else for (int64_t i = 0; i < count; ++i) to[i * stride] = narrow(from[i]);
    } else {
        float* to = reinterpret_cast<float*>(data);
        for (int64_t i = 0; i < count; ++i) to[i * stride] = from[i];
    }
}

// Elements from the start of a tensor to the i-th of its entries, counted over some of its dimensions.
inline int64_t offset_of(int64_t i, const int64_t* size, const int64_t* stride, int64_t dims) {
    int64_t offset = 0;
    for (int64_t d = dims - 1; d >= 0; --d) {
        offset += i % size[d] * stride[d];
        i /= size[d];
    }
    return offset;
}

}  // namespace shardwright
