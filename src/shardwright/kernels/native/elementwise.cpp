// Loops over numbers, one for each operation; see elementwise.h.

#include "elementwise.h"

#include <algorithm>

#include "threads.h"

namespace shardwright {
namespace {

constexpr int64_t CHUNK = 256;  // elements of a row that are widened at once

// f(last), where last is what becomes of each result.
template <typename F>
inline void with_rounding(bool rounds, F f) {
    if (rounds) f([](float value) { return round_half(value); });
    else f([](float value) { return value; });
}

template <int64_t OPERATION>
void each(Extent extent, Rows<float> out, Rows<const float> a, Rows<const float> b, Rows<const float> c) {
    with_rounding(extent.rounds, [&](auto last) __attribute__((always_inline)) {
        for (int64_t r = 0; r < extent.rows; ++r) {
            float* const to = out[r];
            const float *const x = a[r], *const y = b[r], *const z = c[r];
#pragma GCC ivdep  // inputs may be the output, but do not lie across it
            for (int64_t i = 0; i < extent.count; ++i) {
                if constexpr (inputs_of(OPERATION) == 1) to[i] = last(apply<OPERATION>(x[i]));
                else if constexpr (inputs_of(OPERATION) == 2) to[i] = last(apply<OPERATION>(x[i], y[i]));
                else to[i] = last(apply<OPERATION>(x[i], y[i], z[i]));
            }
        }
    });
}

using Each = void (*)(Extent, Rows<float>, Rows<const float>, Rows<const float>, Rows<const float>);
template <int64_t... OPERATIONS>
inline Each each_of(int64_t operation, std::integer_sequence<int64_t, OPERATIONS...>) {
    static constexpr Each all[] = {each<COPY + OPERATIONS>...};
    return all[operation - COPY];
}

// Merges dimensions that all tensors step through evenly. The last dimension is the one of the rows.
int merge(View* views, int count) {
    int dims = 0;
    for (int64_t d = 0; d < views[0].dims; ++d) {
        if (views[0].size[d] == 1) continue;
        bool joins = dims > 0;
        for (int v = 0; v < count && joins; ++v) joins = views[v].stride[dims - 1] == views[v].stride[d] * views[0].size[d];
        if (joins) {
            views[0].size[dims - 1] *= views[0].size[d];
            for (int v = 0; v < count; ++v) views[v].stride[dims - 1] = views[v].stride[d];
        } else {
            views[0].size[dims] = views[0].size[d];
            for (int v = 0; v < count; ++v) views[v].stride[dims] = views[v].stride[d];
            ++dims;
        }
    }
    if (dims == 0) {
        views[0].size[0] = 1;
        for (int v = 0; v < count; ++v) views[v].stride[0] = 1;
        dims = 1;
    }
    return dims;
}

// Calls f(places, steps, count) for pieces of rows of up to `most` numbers: where each tensor's begin, and how far apart its numbers are.
// All have the first one's shape; inputs step by 0 where they are broadcast.
template <typename F>
void each_piece(const View* tensors, int tensor_count, int64_t most, const F& f) {
    View views[MOST_TENSORS];
    std::copy(tensors, tensors + tensor_count, views);
    const int dims = merge(views, tensor_count);
    const int64_t length = views[0].size[dims - 1], pieces = (length + most - 1) / most;
    int64_t outer = 1;
    for (int d = 0; d + 1 < dims; ++d) outer *= views[0].size[d];
    share(outer * pieces, outer * length >= WORTH_THREADS, [&](int64_t task) {
        const int64_t start = task % pieces * most;
        char* places[MOST_TENSORS];
        int64_t steps[MOST_TENSORS];
        for (int v = 0; v < tensor_count; ++v) {
            steps[v] = views[v].stride[dims - 1];
            const int64_t offset = offset_of(task / pieces, views[0].size, views[v].stride, dims - 1) + start * steps[v];
            places[v] = views[v].data + offset * bytes(views[v].type);
        }
        f(places, steps, std::min(most, length - start));
    });
}

// Copies numbers of the same type as they are.
template <typename T>
void move(const View& to, const View& from) {
    const View views[2] = {to, from};
    each_piece(views, 2, WORTH_THREADS, [](char* const* places, const int64_t* steps, int64_t count) {
        T* const target = reinterpret_cast<T*>(places[0]);
        const T* const source = reinterpret_cast<const T*>(places[1]);
        if (steps[0] == 1 && steps[1] == 1) std::memcpy(target, source, count * sizeof(T));
        else for (int64_t i = 0; i < count; ++i) target[i * steps[0]] = source[i * steps[1]];
    });
}

}  // namespace

void compute(int64_t operation, Extent extent, Rows<float> out, Rows<const float> a, Rows<const float> b, Rows<const float> c) {
    if (operation == COPY && !extent.rounds && out.data == a.data) return;
    each_of(operation, std::make_integer_sequence<int64_t, WHERE - COPY + 1>())(extent, out, a, b, c);
}

void elementwise(int64_t operation, const View* tensors, int inputs) {
    each_piece(tensors, inputs + 1, CHUNK, [&](char* const* places, const int64_t* steps, int64_t count) {
        alignas(64) float row[3][CHUNK];
        for (int v = 1; v <= inputs; ++v) load_row(places[v], tensors[v].type, steps[v], count, row[v - 1]);
        compute(operation, {1, count}, {row[0], 0}, {row[0], 0}, {row[1], 0}, {row[2], 0});
        store_row(row[0], count, places[0], tensors[0].type, steps[0]);
    });
}

void copy(const View& to, const View& from) {
    if (to.type != from.type) {
        const View views[2] = {to, from};
        return elementwise(COPY, views, 1);
    }
    switch (bytes(to.type)) {
        case 8: return move<int64_t>(to, from);
        case 4: return move<int32_t>(to, from);
        case 2: return move<int16_t>(to, from);
        default: return move<int8_t>(to, from);
    }
}

}  // namespace shardwright
