// Attention of sequences with several queries each: keys and values of a context are packed as weights are, and multiplied like them.

#pragma once

#include "attention.h"
#include "packed.h"

namespace shardwright {
namespace {

// Some positions of one sequence and KV head, packed.
struct Context {
    int64_t sequence, kv_head, first, length;
    float *keys, *values;  // [panels of positions][key_dim][PANEL], [panels of value_dim][positions, a whole number of panels][PANEL]
    int64_t panels() const { return (length + PANEL - 1) / PANEL; }
};

inline int64_t value_panels(const Shape& shape) { return (shape.value_dim + PANEL - 1) / PANEL; }

template <typename T>
void pack_context(const Shape& shape, const Context& context, const T* keys, const T* values, const int32_t* table, int64_t panel) {
    const int64_t start = panel * PANEL, count = std::min<int64_t>(PANEL, context.length - start), rows = context.panels() * PANEL;
    int64_t slots[PANEL];
    find_slots(shape, table, context.first + start, context.first + start + count - 1, slots);
    float* to = context.keys + start * shape.key_dim;
    if (count < PANEL) std::fill(to, to + PANEL * shape.key_dim, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const T* key = keys + slots[i] * shape.key_stride + context.kv_head * shape.key_dim;
        for (int64_t d = 0; d < shape.key_dim; ++d) to[d * PANEL + i] = widen(key[d]);
    }
    for (int64_t i = 0; i < PANEL; ++i)
        for (int64_t v = 0; v < value_panels(shape); ++v) {
            float* row = context.values + (v * rows + start + i) * PANEL;
            const int64_t width = i < count ? std::min<int64_t>(PANEL, shape.value_dim - v * PANEL) : 0;
            const T* value = values + (i < count ? slots[i] * shape.value_stride + context.kv_head * shape.value_dim + v * PANEL : 0);
            for (int64_t d = 0; d < width; ++d) row[d] = widen(value[d]);
            std::fill(row + width, row + PANEL, 0.0f);
        }
}

// Some of the (token, query head) pairs of a context, counted token by token: those from `start` on, `count` of them.
template <typename T>
void attend_rows(const Shape& shape, const Sequences& step, const Context& context, const T* query, const Extras& extras, int64_t start,
                 int64_t count, T* output) {
    thread_local std::vector<float> scratch;
    const int64_t heads = shape.kv_heads * shape.group, begin = step.starts[context.sequence];
    int64_t token[TILE], head[TILE], low = INT64_MAX, high = 0;
    for (int64_t r = 0; r < count; ++r) {
        token[r] = begin + (start + r) / shape.group;
        head[r] = context.kv_head * shape.group + (start + r) % shape.group;
        low = std::min(low, step.first[token[r]] - context.first);
        high = std::max(high, step.last[token[r]] - context.first);
    }
    float factors[TILE];
    const int64_t from = low / PANEL, to = high / PANEL + 1, width = (to - from) * PANEL;  // panels that any of them sees
    float *const scores = at_line(scratch, count * (width + shape.key_dim)), *const wide = scores + count * width;
    for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < shape.key_dim; ++d)
            wide[d * count + r] = widen(query[(token[r] * heads + head[r]) * shape.key_dim + d]) * shape.scale;
    for (int64_t panel = from; panel < to; ++panel) {
        const float* const own = context.keys + panel * PANEL * shape.key_dim;
        multiply_tile(count, own, wide, shape.key_dim, scores + (panel - from) * PANEL, width, ahead_of(own));
    }
    for (int64_t r = 0; r < count; ++r) {
        const int64_t first = step.first[token[r]] - context.first - from * PANEL;
        const int64_t last = step.last[token[r]] - context.first - from * PANEL;
        factors[r] = weigh(shape, extras.of(shape, head[r]), scores + r * width, first, last, width);
    }
    alignas(64) float sums[TILE * PANEL];
    const int64_t rows = context.panels() * PANEL;
    for (int64_t v = 0; v < value_panels(shape); ++v) {
        multiply_rows(count, context.values + (v * rows + from * PANEL) * PANEL, scores, width, width, sums);
        const int64_t dims = std::min<int64_t>(PANEL, shape.value_dim - v * PANEL);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t d = 0; d < dims; ++d)
                store(sums[r * PANEL + d] * factors[r], output + (token[r] * heads + head[r]) * shape.value_dim + v * PANEL + d);
    }
}

// All sequences of a step with several queries.
template <typename T>
void attend_prompts(const Shape& shape, const Sequences& step, const T* query, const T* keys, const T* values, const Extras& extras,
                    T* output) {
    thread_local std::vector<float> packed;
    thread_local std::vector<Context> contexts;
    thread_local std::vector<std::pair<int64_t, int64_t>> panels, tiles;  // of a context
    contexts.clear();
    panels.clear();
    tiles.clear();
    int64_t size = 0;
    for (int64_t s = 0; s < step.count; ++s) {
        const int64_t begin = step.starts[s], end = step.starts[s + 1];
        if (end - begin < 2) continue;
        const int64_t first = *std::min_element(step.first + begin, step.first + end);
        for (int64_t k = 0; k < shape.kv_heads; ++k) {
            const int64_t number = contexts.size(), rows = (end - begin) * shape.group, num_tiles = (rows + TILE - 1) / TILE;
            contexts.push_back({s, k, first, step.last[end - 1] - first + 1, nullptr, nullptr});
            size += contexts.back().panels() * PANEL * (shape.key_dim + value_panels(shape) * PANEL);
            for (int64_t panel = 0; panel < contexts.back().panels(); ++panel) panels.push_back({number, panel});
            for (int64_t tile = num_tiles - 1; tile >= 0; --tile) tiles.push_back({number, tile});  // the longest first
        }
    }
    float* place = at_line(packed, size);
    for (Context& context : contexts) {
        context.keys = place;
        place += context.panels() * PANEL * shape.key_dim;
        context.values = place;
        place += context.panels() * PANEL * value_panels(shape) * PANEL;
    }
    const Context* const all = contexts.data();
    const auto *const each_panel = panels.data(), *const each_tile = tiles.data();
    const int64_t num_panels = panels.size(), num_tiles = tiles.size();
    share(num_panels, true, [&](int64_t i) {
        const Context& context = all[each_panel[i].first];
        pack_context(shape, context, keys, values, step.tables + context.sequence * step.table_stride, each_panel[i].second);
    });
    share(num_tiles, true, [&](int64_t i) {
        const Context& context = all[each_tile[i].first];
        const int64_t rows = (step.starts[context.sequence + 1] - step.starts[context.sequence]) * shape.group;
        const int64_t start = each_tile[i].second * TILE;
        attend_rows(shape, step, context, query, extras, start, std::min<int64_t>(TILE, rows - start), output);
    }, UNEVEN_PIECES);
}

}  // namespace
}  // namespace shardwright
