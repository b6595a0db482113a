// Operations on every number of tensors by itself.

#pragma once

#include "instructions.h"

namespace shardwright {

constexpr int64_t WORTH_THREADS = 1 << 13;  // elements of an operation

// Rows of numbers in float32, so far apart; 0: the same row again and again.
template <typename T>
struct Rows {
    T* data;
    int64_t step;
    T* operator[](int64_t row) const { return data + row * step; }
};

// How many rows, and how many numbers of each, and whether results are rounded to bfloat16.
struct Extent {
    int64_t rows, count;
    bool rounds = false;
};

// out = the result of an operation on a, b and c, each of which may be out.
void compute(int64_t operation, Extent extent, Rows<float> out, Rows<const float> a, Rows<const float> b, Rows<const float> c);

// The same for tensors: the output, over whose shape it goes, and then inputs, which step by 0 where they are broadcast.
void elementwise(int64_t operation, const View* tensors, int inputs);

// Numbers of the same type are copied as they are.
void copy(const View& to, const View& from);

}  // namespace shardwright
