// Carries out a recorded step: a list of operations on tensors that lie in one arena, in the weights or in the KV cache. Every operation
// computes in float32 and rounds once, as torch's own do. Plain C interface, no torch headers; replay/instructions.py writes the list.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "exported.h"
#include "linears.h"
#include "runs.h"
#include "step_attention.h"

namespace shardwright {
namespace {

// What a step brings for each group of layers that share block tables.
struct Group {
    const int64_t* slots;
    Sequences sequences;
};

// Calls f(output row, input rows...) for every row along the last dimension.
template <typename F>
void each_row(const View& out, const View& in, F f) {
    int64_t outer = 1;
    const int64_t length = in.dims ? in.size[in.dims - 1] : 1;
    for (int64_t d = 0; d + 1 < in.dims; ++d) outer *= in.size[d];
    share(outer, outer * length >= WORTH_THREADS, [&](int64_t i) {
        thread_local std::vector<float> scratch;
        scratch.resize(length);
        const int64_t target = offset_of(i, in.size, out.stride, in.dims - 1), source = offset_of(i, in.size, in.stride, in.dims - 1);
        load_row(in.data + source * bytes(in.type), in.type, in.dims ? in.stride[in.dims - 1] : 1, length, scratch.data());
        f(scratch.data(), length, out.data + target * bytes(out.type));
    });
}

void reduce(int64_t operation, const View& out, const View& in) {
    each_row(out, in, [&](float* row, int64_t length, char* place) {
        const float result = reduction(operation, row, length);
        store_row(&result, 1, place, out.type, 1);
    });
}

void softmax(const View& out, const View& in) {
    each_row(out, in, [&](float* row, int64_t length, char* place) {
        const float largest = largest_of(row, length);
        for (int64_t i = 0; i < length; ++i) row[i] = exponential(row[i] - largest);
        const float total = sum_of(row, length);
        for (int64_t i = 0; i < length; ++i) row[i] /= total;
        store_row(row, length, place, out.type, out.dims ? out.stride[out.dims - 1] : 1);
    });
}

// LAYER_NORM takes the mean off, RMS_NORM does not. Weight and bias may be missing (no dimensions of size).
void normalize(bool centred, float epsilon, const View* t) {
    const View &out = t[0], &in = t[1];
    each_row(out, in, [&](float* row, int64_t length, char* place) {
        thread_local std::vector<float> factors;
        factors.resize(length);
        if (centred) {
            const float mean = sum_of(row, length) / static_cast<float>(length);
            for (int64_t i = 0; i < length; ++i) row[i] -= mean;
        }
        for (int64_t i = 0; i < length; ++i) factors[i] = row[i] * row[i];
        const float scale = 1.0f / std::sqrt(sum_of(factors.data(), length) / static_cast<float>(length) + epsilon);
        for (int64_t i = 0; i < length; ++i) row[i] *= scale;
        if (t[2].data) {
            load_row(t[2].data, t[2].type, 1, length, factors.data());
            for (int64_t i = 0; i < length; ++i) row[i] *= factors[i];
        }
        if (t[3].data) {
            load_row(t[3].data, t[3].type, 1, length, factors.data());
            for (int64_t i = 0; i < length; ++i) row[i] += factors[i];
        }
        store_row(row, length, place, out.type, out.stride[out.dims - 1]);
    });
}

// out[i..., :] = table[index[i...], :]. Returns whether every index is one.
bool take_rows(const View& out, const View& table, const View& index) {
    int64_t count = 1;
    for (int64_t d = 0; d < index.dims; ++d) count *= index.size[d];
    View to = out, from = table;
    to.dims = from.dims = table.dims - 1;
    for (int64_t d = 0; d < to.dims; ++d) {
        to.size[d] = from.size[d] = table.size[d + 1];
        to.stride[d] = out.stride[index.dims + d];
        from.stride[d] = table.stride[d + 1];
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t target = offset_of(i, index.size, out.stride, index.dims);
        int64_t row = reinterpret_cast<const int64_t*>(index.data)[offset_of(i, index.size, index.stride, index.dims)];
        if (row < 0) row += table.size[0];
        if (row < 0 || row >= table.size[0]) return false;
        to.data = out.data + target * bytes(out.type);
        from.data = table.data + row * table.stride[0] * bytes(table.type);
        copy(to, from);
    }
    return true;
}

// out [B, M, N] = a [B, M, K] @ b [B, K, N], small and of any layout.
void product(const View* t) {
    const View &out = t[0], &a = t[1], &b = t[2];
    const int64_t batches = out.size[0], rows = out.size[1], columns = out.size[2], inner = a.size[2];
    share(batches * rows, batches * rows * columns * inner >= WORTH_THREADS, [&](int64_t task) {
        thread_local std::vector<float> sums, row, left;
        sums.assign(columns, 0.0f);
        row.resize(columns);
        left.resize(inner);
        const int64_t batch = task / rows, m = task % rows;
        load_row(a.data + (batch * a.stride[0] + m * a.stride[1]) * bytes(a.type), a.type, a.stride[2], inner, left.data());
        for (int64_t k = 0; k < inner; ++k) {
            load_row(b.data + (batch * b.stride[0] + k * b.stride[1]) * bytes(b.type), b.type, b.stride[2], columns, row.data());
            for (int64_t n = 0; n < columns; ++n) sums[n] = fused(left[k], row[n], sums[n]);
        }
        store_row(sums.data(), columns, out.data + (batch * out.stride[0] + m * out.stride[1]) * bytes(out.type), out.type, out.stride[2]);
    });
}

// [T, heads, dim] of the step to rows of the cache; values: cache, elements from row to row.
void write_cache(const View& from, char* cache, int64_t row_stride, const int64_t* slots) {
    const int64_t size = bytes(from.type), heads = from.size[1], dim = from.size[2];
    share(from.size[0], from.size[0] * heads * dim >= WORTH_THREADS, [&](int64_t token) {
        for (int64_t head = 0; head < heads; ++head) {
            char* const to = cache + (slots[token] * row_stride + head * dim) * size;
            const char* const own = from.data + (token * from.stride[0] + head * from.stride[1]) * size;
            if (from.stride[2] == 1) std::memcpy(to, own, dim * size);
            else for (int64_t i = 0; i < dim; ++i) std::memcpy(to + i * size, own + i * from.stride[2] * size, size);
        }
    });
}

// A view [T, heads, dim] whose numbers lie side by side.
View side_by_side(const View& view, void* data) {
    View result = view;
    result.data = static_cast<char*>(data);
    result.stride[0] = view.size[1] * view.size[2];
    result.stride[1] = view.size[2];
    result.stride[2] = 1;
    return result;
}

bool lies_side_by_side(const View& view) {
    const View other = side_by_side(view, view.data);
    return std::equal(view.stride, view.stride + 3, other.stride);
}

template <typename T>
void attention(const Instruction& in, const Group& group) {
    thread_local std::vector<T> query, result;
    const View &out = in.tensor[0], &q = in.tensor[1];
    const int64_t tokens = q.size[0], heads = q.size[1], dim = q.size[2], value_dim = out.size[2], kv_heads = in.value[6];
    const T* own_query = reinterpret_cast<const T*>(q.data);
    if (!lies_side_by_side(q)) {
        query.resize(tokens * heads * dim);
        copy(side_by_side(q, query.data()), q);
        own_query = query.data();
    }
    const bool is_direct = lies_side_by_side(out);
    if (!is_direct) result.resize(tokens * heads * value_dim);
    T* const own_result = is_direct ? reinterpret_cast<T*>(out.data) : result.data();
    const Shape shape{kv_heads, heads / kv_heads, dim, value_dim, in.value[5], in.value[3], in.value[4],
                      as_float(in.value[7]), as_float(in.value[8]), in.value[11]};
    attend(shape, group.sequences, own_query, reinterpret_cast<const T*>(in.value[1]), reinterpret_cast<const T*>(in.value[2]),
           {reinterpret_cast<const float*>(in.value[9]), reinterpret_cast<const float*>(in.value[10])}, own_result);
    if (!is_direct) copy(out, side_by_side(out, own_result));
}

// The weights of all products from `start` to the next HOST instruction, and behind them one reading of nothing.
const Reading* find_readings(const Instruction* instructions, int64_t count, int64_t start) {
    static std::atomic<int64_t> numbers{0};
    thread_local std::vector<Reading> readings;
    readings.clear();
    for (int64_t i = start; i < count && instructions[i].operation != HOST; ++i) {
        if (instructions[i].operation != LINEAR) continue;
        const bool is_joined = instructions[i].value[0] && i > start && instructions[i - 1].operation == LINEAR && readings.back().count < MOST_JOINED;
        if (!is_joined) readings.push_back({++numbers, 0, 0, {}});
        Reading& own = readings.back();
        own.weights[own.count++] = panels_of(instructions[i]);
        own.total += own.weights[own.count - 1].count;
    }
    readings.push_back({++numbers, 0, 0, {}});
    return readings.data();
}

// Runs instructions from `start` on, whose weights are `next`, of which the one that is read now or next is told in `coming`. Returns the
// number of instructions when done, that of the first HOST instruction that is met, or -1 - the number of one with an index that is out of
// range.
int64_t run(const Instruction* instructions, int64_t count, int64_t start, const Group* groups, const Reading* next,
            std::atomic<const Reading*>& coming) {
    for (int64_t i = start; i < count; ++i) {
        const Instruction& in = instructions[i];
        const View* t = in.tensor;
        if (in.operation >= COPY && in.operation <= AMAX && in.value[MOST_VALUES - 1]) {
            run_rows(&in);
            i += in.value[MOST_VALUES - 1] - 1;
            continue;
        }
        switch (in.operation) {
            case HOST: return i;
            case COPY: copy(t[0], t[1]); break;
            case SUM: case MEAN: case AMAX: reduce(in.operation, t[0], t[1]); break;
            case SOFTMAX: softmax(t[0], t[1]); break;
            case LAYER_NORM: normalize(true, as_float(in.value[0]), t); break;
            case RMS_NORM: normalize(false, as_float(in.value[0]), t); break;
            case ROWS: if (!take_rows(t[0], t[1], t[2])) return -1 - i; break;
            case LINEAR:
                linears(&in, next->count, next);
                i += next->count - 1;
                coming.store(++next, std::memory_order_release);
                break;
            case PRODUCT: product(t); break;
            case WRITE_CACHE: {
                const Group& group = groups[in.value[0]];
                write_cache(t[1], reinterpret_cast<char*>(in.value[1]), in.value[3], group.slots);
                write_cache(t[2], reinterpret_cast<char*>(in.value[2]), in.value[4], group.slots);
                break;
            }
            case ATTENTION:
                if (t[1].type == BF16) attention<uint16_t>(in, groups[in.value[0]]);
                else attention<float>(in, groups[in.value[0]]);
                break;
            default: elementwise(in.operation, t, inputs_of(in.operation));
        }
    }
    return count;
}

}  // namespace
}  // namespace shardwright

using namespace shardwright;

// See run.
EXPORTED int64_t replay(const Instruction* instructions, int64_t count, int64_t start, const Group* groups) {
    int64_t reached = 0;
    const Reading* const readings = find_readings(instructions, count, start);
    std::atomic<const Reading*> coming{readings};
    lead([&] { reached = run(instructions, count, start, groups, readings, coming); },
         [&] { return own_stream().fetch(*coming.load(std::memory_order_acquire), block_bytes()); });
    return reached;
}
