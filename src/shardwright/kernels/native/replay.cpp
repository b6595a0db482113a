// Carries out a recorded step: a list of operations on tensors that lie in one arena, in the weights or in the KV cache. Every operation
// computes in float32 and rounds once, as torch's own do. Plain C interface, no torch headers; replay/instructions.py writes the list.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "compact.h"
#include "packed_codes.h"
#include "step_attention.h"

namespace {

constexpr int MOST_DIMS = 6, MOST_TENSORS = 4, MOST_VALUES = 12;
constexpr int64_t CHUNK = 256;              // elements of a row that are widened at once
constexpr int64_t WORTH_THREADS = 1 << 13;  // elements of an operation
constexpr int64_t RUN_NUMBERS = 4096;       // in float32 that a run of instructions works on at once: half of the nearest cache

enum Type : int64_t { F32, BF16, I64, BOOL, I32, U8 };

struct View {
    char* data;
    int64_t type, dims;
    int64_t size[MOST_DIMS], stride[MOST_DIMS];  // strides in elements
};

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

struct Instruction {
    int64_t operation;
    int64_t value[MOST_VALUES];
    View tensor[MOST_TENSORS];  // the first is the output
};

// What a step brings for each group of layers that share block tables.
struct Group {
    const int64_t* slots;
    Sequences sequences;
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

// f(last), where last is what becomes of each result.
template <typename F>
inline void with_rounding(bool rounds, F f) {
    if (rounds) f([](float value) { return round_half(value); });
    else f([](float value) { return value; });
}

template <typename F>
inline void each(Extent extent, Rows<float> out, Rows<const float> a, F f) {
    with_rounding(extent.rounds, [&](auto last) __attribute__((always_inline)) {
        for (int64_t r = 0; r < extent.rows; ++r) {
            float* const to = out[r];
            const float* const x = a[r];
#pragma GCC ivdep  // inputs may be the output, but do not lie across it
            for (int64_t i = 0; i < extent.count; ++i) to[i] = last(f(x[i]));
        }
    });
}

template <typename F>
inline void each(Extent extent, Rows<float> out, Rows<const float> a, Rows<const float> b, F f) {
    with_rounding(extent.rounds, [&](auto last) __attribute__((always_inline)) {
        for (int64_t r = 0; r < extent.rows; ++r) {
            float* const to = out[r];
            const float *const x = a[r], *const y = b[r];
#pragma GCC ivdep
            for (int64_t i = 0; i < extent.count; ++i) to[i] = last(f(x[i], y[i]));
        }
    });
}

// out = the result of an operation on a, b and c, each of which may be out.
void compute(int64_t operation, Extent extent, Rows<float> out, Rows<const float> a, Rows<const float> b, Rows<const float> c) {
    switch (operation) {
        case COPY:
            if (extent.rounds) each(extent, out, a, [](float x) { return x; });
            else if (out.data != a.data)
                for (int64_t r = 0; r < extent.rows; ++r) std::memmove(out[r], a[r], extent.count * sizeof(float));
            break;
        case NEG: each(extent, out, a, [](float x) { return -x; }); break;
        case ABS: each(extent, out, a, [](float x) { return std::fabs(x); }); break;
        case EXP: each(extent, out, a, [](float x) { return exponential(x); }); break;
        case LOG: each(extent, out, a, [](float x) { return std::log(x); }); break;
        case SQRT: each(extent, out, a, [](float x) { return std::sqrt(x); }); break;
        case RSQRT: each(extent, out, a, [](float x) { return 1.0f / std::sqrt(x); }); break;
        case RECIPROCAL: each(extent, out, a, [](float x) { return 1.0f / x; }); break;
        case SIN: each(extent, out, a, [](float x) { return std::sin(x); }); break;
        case COS: each(extent, out, a, [](float x) { return std::cos(x); }); break;
        case TANH: each(extent, out, a, [](float x) { return std::tanh(x); }); break;
        case SIGMOID: each(extent, out, a, [](float x) { return sigmoid(x); }); break;
        case SILU: each(extent, out, a, [](float x) { return x * sigmoid(x); }); break;
        case GELU: each(extent, out, a, [](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }); break;
        case GELU_TANH:
            each(extent, out, a, [](float x) { return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); });
            break;
        case RELU: each(extent, out, a, [](float x) { return x < 0.0f ? 0.0f : x; }); break;
        case ERF: each(extent, out, a, [](float x) { return std::erf(x); }); break;
        case SQUARE: each(extent, out, a, [](float x) { return x * x; }); break;
        case ADD: each(extent, out, a, b, [](float x, float y) { return x + y; }); break;
        case SUB: each(extent, out, a, b, [](float x, float y) { return x - y; }); break;
        case MUL: each(extent, out, a, b, [](float x, float y) { return x * y; }); break;
        case DIV: each(extent, out, a, b, [](float x, float y) { return x / y; }); break;
        case MAXIMUM: each(extent, out, a, b, [](float x, float y) { return x > y || x != x ? x : y; }); break;
        case MINIMUM: each(extent, out, a, b, [](float x, float y) { return x < y || x != x ? x : y; }); break;
        case POW: each(extent, out, a, b, [](float x, float y) { return std::pow(x, y); }); break;
        case WHERE:
            for (int64_t r = 0; r < extent.rows; ++r)
                for (int64_t i = 0; i < extent.count; ++i) {
                    const float value = a[r][i] != 0.0f ? b[r][i] : c[r][i];
                    out[r][i] = extent.rounds ? round_half(value) : value;
                }
            break;
        default: std::abort();
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

// Elementwise, over the output's shape.
void elementwise(int64_t operation, const View* tensors, int inputs) {
    each_piece(tensors, inputs + 1, CHUNK, [&](char* const* places, const int64_t* steps, int64_t count) {
        alignas(64) float row[3][CHUNK];
        for (int v = 1; v <= inputs; ++v) load_row(places[v], tensors[v].type, steps[v], count, row[v - 1]);
        compute(operation, {1, count}, {row[0], 0}, {row[0], 0}, {row[1], 0}, {row[2], 0});
        store_row(row[0], count, places[0], tensors[0].type, steps[0]);
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
        float result;
        if (operation == AMAX) result = largest_of(row, length);
        else result = sum_of(row, length) / (operation == MEAN ? static_cast<float>(length) : 1.0f);
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

// As store_row, for numbers that are of that type already.
inline void store_rounded(const float* from, int64_t count, char* data, int64_t type, int64_t stride) {
    if (type != BF16) return store_row(from, count, data, type, stride);
    uint16_t* const to = reinterpret_cast<uint16_t*>(data);
    if (stride == 1) for (int64_t i = 0; i < count; ++i) to[i] = narrow_rounded(from[i]);
    else for (int64_t i = 0; i < count; ++i) to[i * stride] = narrow_rounded(from[i]);
}

// Whether an operation gives numbers of bfloat16 as they are: it takes them from its inputs.
inline bool is_exact(const Instruction& in, int inputs) {
    switch (in.operation) {
        case COPY: case NEG: case ABS: case RELU: case MAXIMUM: case MINIMUM: case AMAX:
            return std::all_of(in.tensor + 1, in.tensor + 1 + inputs, [](const View& view) { return view.type == BF16; });
        default: return false;
    }
}

// Some rows of a run: they follow each other in the dimension before the last, or there is one.
struct Part {
    int64_t place, rows;  // of the first of them, counted over all dimensions but the last
    int64_t dims;         // without the last
    const int64_t* size;  // of the output's dimensions

    // Bytes from the start of a tensor to the first of the rows, and from one to the next.
    int64_t start(const View& view) const { return offset_of(place, size, view.stride, dims) * bytes(view.type); }
    int64_t step(const View& view) const { return dims > 0 ? view.stride[dims - 1] * bytes(view.type) : 0; }
};

// One instruction of a run, on some rows. Each has `width` numbers of scratch: `kept` of what the run makes, and then three rows of inputs.
void run_part(const Instruction& in, const Part& part, float* own, int64_t width, int64_t kept, int64_t longest) {
    const View& out = in.tensor[0];
    const int64_t dims = part.dims, length = in.tensor[1].size[dims], target = in.value[0];
    const bool reduces = in.operation >= SUM;
    const int64_t made = reduces ? 1 : length;
    const int inputs = in.operation == WHERE ? 3 : in.operation >= ADD && !reduces ? 2 : 1;
    Rows<const float> input[3] = {};
    for (int v = 0; v < inputs; ++v) {
        const View& view = in.tensor[v + 1];
        const int64_t step = view.stride[dims], place = in.value[v + 1];
        float* const copied = own + kept + v * longest;
        input[v] = {copied, width};
        if (place < 0) {
            const char* const data = view.data + part.start(view);
            const int64_t row_step = part.step(view);
            if (view.type == F32 && step == 1) {
                input[v] = {reinterpret_cast<const float*>(data), row_step / 4};
            } else if (row_step == 0) {
                load_row(data, view.type, step, length, copied);
                input[v] = {copied, 0};
            } else {
                for (int64_t r = 0; r < part.rows; ++r) load_row(data + r * row_step, view.type, step, length, copied + r * width);
            }
        } else if (step == 0) {
            for (int64_t r = 0; r < part.rows; ++r) std::fill_n(copied + r * width, length, own[place + r * width]);
        } else if (place != target && place < target + made && target < place + length) {
            for (int64_t r = 0; r < part.rows; ++r)  // the result lies across it
                std::memcpy(copied + r * width, own + place + r * width, length * sizeof(float));
        } else {
            input[v] = {own + place, width};
        }
    }
    const Rows<float> result{own + target, width};
    const bool rounds = out.type == BF16 && !is_exact(in, inputs);
    if (reduces) {
        for (int64_t r = 0; r < part.rows; ++r) {
            const float total = in.operation == AMAX ? largest_of(input[0][r], length) : sum_of(input[0][r], length);
            const float value = in.operation == MEAN ? total / static_cast<float>(length) : total;
            *result[r] = rounds ? round_half(value) : value;
        }
    } else {
        compute(in.operation, {part.rows, length, rounds}, result, input[0], input[1], input[2]);
    }
    if (!in.value[MOST_TENSORS]) return;
    char* const data = out.data + part.start(out);
    const int64_t row_step = part.step(out);
    for (int64_t r = 0; r < part.rows; ++r) store_rounded(result[r], made, data + r * row_step, out.type, out.stride[dims]);
}

// A run of instructions on the same rows, see replay/fuse.py. Short rows are taken several at a time.
void run_rows(const Instruction* run) {
    const int64_t kept = run->value[MOST_VALUES - 2], count = run->value[MOST_VALUES - 1];
    const int64_t dims = run->tensor[0].dims - 1, *const size = run->tensor[0].size, inner = dims > 0 ? size[dims - 1] : 1;
    int64_t outer = 1, longest = 1;
    for (int64_t d = 0; d + 1 < dims; ++d) outer *= size[d];
    for (int64_t i = 0; i < count; ++i)
        for (int v = 0; v < 2; ++v) longest = std::max(longest, run[i].tensor[v].data ? run[i].tensor[v].size[dims] : 1);
    longest = (longest + ROW_LANES - 1) / ROW_LANES * ROW_LANES;
    const int64_t width = kept + 3 * longest, most = std::max<int64_t>(1, RUN_NUMBERS / width), parts = (inner + most - 1) / most;
    share(outer * parts, outer * inner * longest * count >= WORTH_THREADS, [&](int64_t task) {
        thread_local std::vector<float> scratch;
        const int64_t first = task % parts * most;
        const Part part{task / parts * inner + first, std::min(most, inner - first), dims, size};
        float* const own = at_line(scratch, width * most);
        for (int64_t i = 0; i < count; ++i) run_part(run[i], part, own, width, kept, longest);
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

// out [M, N] = x [M, K] @ weight.T + bias [N], float32, for instructions that follow each other and have the same x; weights are packed.
template <typename P, typename Inputs>
void linears(const Instruction* instructions, const Tiles& tiles, const Inputs& inputs, const Reading& reading) {
    P products[MOST_JOINED];
    for (int i = 0; i < reading.count; ++i)
        products[i] = {reinterpret_cast<decltype(P::weight)>(instructions[i].tensor[2].data), instructions[i].tensor[0].size[1]};
    multiply(tiles, inputs, products, reading.count, [&](int number, int64_t token, int64_t tokens, int64_t feature, int64_t features, float* sums) {
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
    }, &reading);
}

// Products that follow each other and have the same input. Those of codes have a group size and bits; other bytes are bfloat16 in 12 bits.
void linears(const Instruction* instructions, const Reading& reading) {
    const View& x = instructions[0].tensor[1];
    const int64_t type = instructions[0].tensor[2].type, group_size = instructions[0].value[1], code_bits = instructions[0].value[2];
    const Tiles tiles(x.size[0]);
    const auto read = [&](int64_t token, int64_t first, int64_t last, float* row) {
        load_row(x.data + (token * x.stride[0] + first * x.stride[1]) * bytes(x.type), x.type, x.stride[1], last - first, row);
    };
    if (type == U8 && code_bits) {
        with_codes(code_bits, x.type == BF16, [&](auto codes) {
            using Codes = decltype(codes);
            linears<Coded<Codes>>(instructions, tiles, round_inputs<Codes>(tiles, x.size[1], group_size, read), reading);
        });
    } else {
        const Arranged inputs = arrange(tiles, x.size[1], read);
        if (type == U8) linears<CompactProduct>(instructions, tiles, inputs, reading);
        else if (type == BF16) linears<Product<uint16_t>>(instructions, tiles, inputs, reading);
        else linears<Product<float>>(instructions, tiles, inputs, reading);
    }
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
            for (int64_t n = 0; n < columns; ++n) sums[n] += left[k] * row[n];
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

Panels panels_of(const Instruction& in) {
    const View &x = in.tensor[1], &weight = in.tensor[2];
    const int64_t outer = in.tensor[0].size[1], inner = x.size[1], group_size = in.value[1], code_bits = in.value[2];
    uint8_t* const data = reinterpret_cast<uint8_t*>(weight.data);
    Panels panels{};
    if (weight.type == F32) panels = Product<float>{reinterpret_cast<const float*>(data), outer}.panels(inner);
    else if (weight.type == BF16) panels = Product<uint16_t>{reinterpret_cast<const uint16_t*>(data), outer}.panels(inner);
    else if (code_bits == 0) panels = CompactProduct{data, outer}.panels(inner, x.size[0]);
    else with_codes(code_bits, x.type == BF16, [&](auto codes) { panels = Coded<decltype(codes)>{data, outer}.panels(inner, group_size); });
    return panels;
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
                linears(&in, *next);
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
            default: elementwise(in.operation, t, in.operation == WHERE ? 3 : in.operation >= ADD ? 2 : 1);
        }
    }
    return count;
}

}  // namespace

// See run.
extern "C" int64_t replay(const Instruction* instructions, int64_t count, int64_t start, const Group* groups) {
    int64_t reached = 0;
    const Reading* const readings = find_readings(instructions, count, start);
    std::atomic<const Reading*> coming{readings};
    lead([&] { reached = run(instructions, count, start, groups, readings, coming); },
         [&] { return own_stream().fetch(*coming.load(std::memory_order_acquire), block_bytes()); });
    return reached;
}
