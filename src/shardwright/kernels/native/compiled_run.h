// What compiled runs of operations are made of: replay/compile_runs.py writes their functions as lists of these calls, in which every size is
// a number, so that the compiler unrolls loops and keeps numbers in registers. They compute what runs.h does, number by number.

#pragma once

#include "exported.h"
#include "operations.h"

namespace shardwright {
namespace {

inline float number(uint16_t bits) { return widen(bits); }
template <typename T>
inline float number(T value) { return static_cast<float>(value); }

// Numbers of a row in memory or, of float32, of what the run keeps; so many elements apart.
template <typename T, int64_t STEP>
struct Numbers {
    const T* data;
    float operator[](int64_t i) const { return number(data[i * STEP]); }
};

// Where the rows of a run's tensors in memory begin, and which of them is the one in hand; steps are in bytes.
struct Row {
    char* const* places;
    const int64_t* steps;
    int64_t row;

    template <typename T>
    T* start(int64_t tensor) const { return reinterpret_cast<T*>(places[tensor] + row * steps[tensor]); }
    template <typename T, int64_t STEP>
    Numbers<T, STEP> numbers(int64_t tensor) const { return {start<const T>(tensor)}; }
};

template <bool ROUNDS>
inline float rounded(float value) { return ROUNDS ? round_half(value) : value; }

// to[i] = the result of an operation on the i-th of all inputs, which may be `to`, but do not lie across it.
template <int64_t OPERATION, int64_t COUNT, bool ROUNDS, typename... Inputs>
__attribute__((always_inline)) inline void each(float* to, Inputs... inputs) {
#pragma GCC ivdep
    for (int64_t i = 0; i < COUNT; ++i) to[i] = rounded<ROUNDS>(apply<OPERATION>(inputs[i]...));
}

// The same where an input may lie across `to`.
template <int64_t OPERATION, int64_t COUNT, bool ROUNDS, typename... Inputs>
__attribute__((always_inline)) inline void each_aside(float* to, Inputs... inputs) {
    alignas(LINE) float results[COUNT];
    each<OPERATION, COUNT, ROUNDS>(results, inputs...);
    std::memcpy(to, results, sizeof results);
}

// *to = the result of an operation on all numbers of a row.
template <int64_t OPERATION, int64_t COUNT, bool ROUNDS>
__attribute__((always_inline)) inline void reduce(float* to, Numbers<float, 1> input) {
    *to = rounded<ROUNDS>(reduction(OPERATION, input.data, COUNT));
}
template <int64_t OPERATION, int64_t COUNT, bool ROUNDS, typename Input>
__attribute__((always_inline)) inline void reduce(float* to, Input input) {
    alignas(LINE) float row[COUNT];
    for (int64_t i = 0; i < COUNT; ++i) row[i] = input[i];
    reduce<OPERATION, COUNT, ROUNDS>(to, Numbers<float, 1>{row});
}

// Writes numbers that are of type T already.
template <int64_t COUNT, int64_t STEP, typename T>
__attribute__((always_inline)) inline void write(const float* from, T* to) {
    for (int64_t i = 0; i < COUNT; ++i) {
        if constexpr (is_bfloat16(static_cast<T*>(nullptr))) to[i * STEP] = narrow_rounded(from[i]);
        else to[i * STEP] = from[i];
    }
}

}  // namespace
}  // namespace shardwright
