// Runs of operations on the same rows (replay/fuse.py): one operation after another on a few rows at a time, or by a function that was
// compiled for the run.

#pragma once

#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "threads.h"

namespace shardwright {
namespace {

constexpr int64_t RUN_NUMBERS = 4096;  // in float32 that a run of instructions works on at once: half of the nearest cache

// As store_row, for numbers that are of that type already.
inline void store_rounded(const float* from, int64_t count, char* data, int64_t type, int64_t stride) {
    if (type != BF16) return store_row(from, count, data, type, stride);
    uint16_t* const to = reinterpret_cast<uint16_t*>(data);
    if (stride == 1) for (int64_t i = 0; i < count; ++i) to[i] = narrow_rounded(from[i]);
    else for (int64_t i = 0; i < count; ++i) to[i * stride] = narrow_rounded(from[i]);
}

// Whether the results of an instruction are to be rounded to bfloat16.
inline bool rounds(const Instruction& in) {
    const View* const inputs = in.tensor + 1;
    const auto is_half = [](const View& view) { return view.type == BF16; };
    return is_half(in.tensor[0]) && !(is_exact(in.operation) && std::all_of(inputs, inputs + inputs_of(in.operation), is_half));
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

inline int64_t count_rows(const Instruction* run) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < run->tensor[0].dims; ++d) rows *= run->tensor[0].size[d];
    return rows;
}

// One instruction of a run, on some rows. Each has `width` numbers of scratch: `kept` of what the run makes, and then three rows of inputs.
void run_part(const Instruction& in, const Part& part, float* own, int64_t width, int64_t kept, int64_t longest) {
    const View& out = in.tensor[0];
    const int64_t dims = part.dims, length = in.tensor[1].size[dims], target = in.value[0];
    const int64_t made = reduces(in.operation) ? 1 : length;
    const int inputs = inputs_of(in.operation);
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
    if (reduces(in.operation)) {
        for (int64_t r = 0; r < part.rows; ++r) {
            const float value = reduction(in.operation, input[0][r], length);
            *result[r] = rounds(in) ? round_half(value) : value;
        }
    } else {
        compute(in.operation, {part.rows, length, rounds(in)}, result, input[0], input[1], input[2]);
    }
    if (!in.value[MOST_TENSORS]) return;
    char* const data = out.data + part.start(out);
    const int64_t row_step = part.step(out);
    for (int64_t r = 0; r < part.rows; ++r) store_rounded(result[r], made, data + r * row_step, out.type, out.stride[dims]);
}

// Calls f(part) for parts of all rows of a run, of up to `most` rows each.
template <typename F>
void each_part(const Instruction* run, int64_t rows, int64_t most, bool is_worth, const F& f) {
    const int64_t dims = run->tensor[0].dims - 1, *const size = run->tensor[0].size, inner = dims > 0 ? size[dims - 1] : 1;
    const int64_t parts = (inner + most - 1) / most, outer = rows / inner;
    share(outer * parts, is_worth, [&](int64_t task) {
        const int64_t first = task % parts * most;
        f(Part{task / parts * inner + first, std::min(most, inner - first), dims, size});
    });
}

// A run that was compiled (replay/compile_runs.py): its tensors in memory are told in the order of the instructions, inputs first.
using Compiled = void (*)(char* const* places, const int64_t* steps, int64_t rows);

void run_compiled(const Instruction* run, Compiled function, int64_t count, int64_t rows, bool is_worth) {
    const View* operands[MOST_OPERANDS];
    int num_operands = 0;
    for (int64_t i = 0; i < count; ++i) {
        for (int v = 1; v <= inputs_of(run[i].operation); ++v)
            if (run[i].value[v] < 0) operands[num_operands++] = &run[i].tensor[v];
        if (run[i].value[MOST_TENSORS]) operands[num_operands++] = &run[i].tensor[0];
    }
    const int64_t pieces = own_team() && is_worth ? own_team()->threads() * PIECES_PER_THREAD : 1;
    each_part(run, rows, (rows + pieces - 1) / pieces, is_worth, [&](const Part& part) {
        char* places[MOST_OPERANDS];
        int64_t steps[MOST_OPERANDS];
        for (int o = 0; o < num_operands; ++o) {
            places[o] = operands[o]->data + part.start(*operands[o]);
            steps[o] = part.step(*operands[o]);
        }
        function(places, steps, part.rows);
    });
}

// A run of instructions on the same rows. Short rows are taken several at a time.
void run_rows(const Instruction* run) {
    const int64_t compiled = run->value[MOST_VALUES - 3], kept = run->value[MOST_VALUES - 2], count = run->value[MOST_VALUES - 1];
    const int64_t dims = run->tensor[0].dims - 1, rows = count_rows(run);
    if (rows == 0) return;
    int64_t longest = 1;
    for (int64_t i = 0; i < count; ++i)
        for (int v = 0; v < 2; ++v) longest = std::max(longest, run[i].tensor[v].data ? run[i].tensor[v].size[dims] : 1);
    const bool is_worth = rows * longest * count >= WORTH_THREADS;
    if (compiled) return run_compiled(run, reinterpret_cast<Compiled>(compiled), count, rows, is_worth);
    longest = (longest + ROW_LANES - 1) / ROW_LANES * ROW_LANES;
    const int64_t width = kept + 3 * longest, most = std::max<int64_t>(1, RUN_NUMBERS / width);
    each_part(run, rows, most, is_worth, [&](const Part& part) {
        thread_local std::vector<float> scratch;
        float* const own = at_line(scratch, width * most);
        for (int64_t i = 0; i < count; ++i) run_part(run[i], part, own, width, kept, longest);
    });
}

}  // namespace
}  // namespace shardwright
