// Attention as a function of its own. Plain C interface, no torch headers.

#include "step_attention.h"

// is_bf16: type of query, keys, values and output; else float32. Other arguments as in kernels/attention.py.
extern "C" void paged_attention(int is_bf16, int64_t sequences, int64_t kv_heads, int64_t group, int64_t key_dim, int64_t value_dim,
                                int64_t block_size, int64_t key_stride, int64_t value_stride, float scale, float softcap,
                                const void* query, const void* keys, const void* values, const int64_t* starts, const int32_t* tables,
                                int64_t table_stride, const int64_t* first, const int64_t* last, const float* sinks, const float* bias,
                                int64_t distances, void* output) {
    const Shape shape{kv_heads, group, key_dim, value_dim, block_size, key_stride, value_stride, scale, softcap, distances};
    const Sequences step{sequences, starts, tables, table_stride, first, last};
    const Extras extras{sinks, bias};
    if (is_bf16)
        attend(shape, step, static_cast<const uint16_t*>(query), static_cast<const uint16_t*>(keys), static_cast<const uint16_t*>(values),
               extras, static_cast<uint16_t*>(output));
    else
        attend(shape, step, static_cast<const float*>(query), static_cast<const float*>(keys), static_cast<const float*>(values), extras,
               static_cast<float*>(output));
}
