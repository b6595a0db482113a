// What the operations of a recorded step do with each number: in float32, one rounding after another, except where `fused` says otherwise.

#pragma once

#include "vector.h"

namespace shardwright {

// As replay/instructions.py numbers them.
enum Operation : int64_t {
    HOST,
    COPY, NEG, ABS, EXP, LOG, SQRT, RSQRT, RECIPROCAL, SIN, COS, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU, ERF, SQUARE,
    ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, POW,
    WHERE,
    SUM, MEAN, AMAX, SOFTMAX, LAYER_NORM, RMS_NORM,
    ROWS, LINEAR, PRODUCT,
    WRITE_CACHE, ATTENTION,
};

constexpr int MOST_OPERANDS = 48;  // tensors in memory of a run that is compiled

// Whether an operation makes one number of a whole row.
constexpr bool reduces(int64_t operation) { return operation >= SUM && operation <= AMAX; }

// How many inputs an operation on rows has.
constexpr int inputs_of(int64_t operation) { return operation == WHERE ? 3 : operation >= ADD && operation < WHERE ? 2 : 1; }

// Whether an operation gives numbers of a narrower type as they are, if its inputs are of that type: it takes them from there.
constexpr bool is_exact(int64_t operation) {
    switch (operation) {
        case COPY: case NEG: case ABS: case RELU: case MAXIMUM: case MINIMUM: case AMAX: return true;
        default: return false;
    }
}

template <int64_t OPERATION>
__attribute__((always_inline)) inline float apply(float x, float y = 0.0f, float z = 0.0f) {
    if constexpr (OPERATION == COPY) return x;
    else if constexpr (OPERATION == NEG) return -x;
    else if constexpr (OPERATION == ABS) return std::fabs(x);
    else if constexpr (OPERATION == EXP) return exponential(x);
    else if constexpr (OPERATION == LOG) return std::log(x);
    else if constexpr (OPERATION == SQRT) return std::sqrt(x);
    else if constexpr (OPERATION == RSQRT) return 1.0f / std::sqrt(x);
    else if constexpr (OPERATION == RECIPROCAL) return 1.0f / x;
    else if constexpr (OPERATION == SIN) return std::sin(x);
    else if constexpr (OPERATION == COS) return std::cos(x);
    else if constexpr (OPERATION == TANH) return std::tanh(x);
    else if constexpr (OPERATION == SIGMOID) return sigmoid(x);
    else if constexpr (OPERATION == SILU) return x * sigmoid(x);
    else if constexpr (OPERATION == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    else if constexpr (OPERATION == GELU_TANH) return 0.5f * x * (1.0f + std::tanh(0.79788456f * fused(0.044715f * x * x, x, x)));
    else if constexpr (OPERATION == RELU) return x < 0.0f ? 0.0f : x;
    else if constexpr (OPERATION == ERF) return std::erf(x);
    else if constexpr (OPERATION == SQUARE) return x * x;
    else if constexpr (OPERATION == ADD) return x + y;
    else if constexpr (OPERATION == SUB) return x - y;
    else if constexpr (OPERATION == MUL) return x * y;
    else if constexpr (OPERATION == DIV) return x / y;
    else if constexpr (OPERATION == MAXIMUM) return x > y || x != x ? x : y;
    else if constexpr (OPERATION == MINIMUM) return x < y || x != x ? x : y;
    else if constexpr (OPERATION == POW) return std::pow(x, y);
    else {
        static_assert(OPERATION == WHERE);
        return x != 0.0f ? y : z;
    }
}

__attribute__((always_inline)) inline float reduction(int64_t operation, const float* row, int64_t length) {
    if (operation == AMAX) return largest_of(row, length);
    const float total = sum_of(row, length);
    return operation == MEAN ? total / static_cast<float>(length) : total;
}

}  // namespace shardwright
