// Attention, of a recorded step and as a function of its own. Plain C interface, no torch headers.

#include "decode.h"
#include "exported.h"
#include "prompts.h"
#include "step_attention.h"

namespace shardwright {

template <typename T>
void attend(const Shape& shape, const Sequences& step, const T* query, const T* keys, const T* values, const Extras& extras, T* output) {
    const bool has_prompts = attend_decodes(shape, step, query, keys, values, extras, output);
    if (has_prompts) attend_prompts(shape, step, query, keys, values, extras, output);
}
template void attend(const Shape&, const Sequences&, const float*, const float*, const float*, const Extras&, float*);
template void attend(const Shape&, const Sequences&, const uint16_t*, const uint16_t*, const uint16_t*, const Extras&, uint16_t*);

}  // namespace shardwright

using namespace shardwright;

// is_bf16: type of query, keys, values and output; else float32. Other arguments as in kernels/attention.py.
EXPORTED void paged_attention(int is_bf16, int64_t sequences, int64_t kv_heads, int64_t group, int64_t key_dim, int64_t value_dim,
                              int64_t block_size, int64_t key_stride, int64_t value_stride, float scale, float softcap, const void* query,
                              const void* keys, const void* values, const int64_t* starts, const int32_t* tables, int64_t table_stride,
                              const int64_t* first, const int64_t* last, const float* sinks, const float* bias, int64_t distances, void* output) {
    const Shape shape{kv_heads, group, key_dim, value_dim, block_size, key_stride, value_stride, scale, softcap, distances};
    const Sequences step{sequences, starts, tables, table_stride, first, last};
    const Extras extras{sinks, bias};
    const auto typed = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        lead([&] {
            attend(shape, step, static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values), extras,
                   static_cast<T*>(output));
        });
    };
    uint16_t* half = nullptr;
    float* whole = nullptr;
    is_bf16 ? typed(half) : typed(whole);
}
