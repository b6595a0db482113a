// Linear layers with bfloat16 weights for a few tokens, as a function of its own. Plain C interface, no torch headers.

#include "linear.h"

// input [tokens, inner] float32, weight [outer, inner] bfloat16, bias [outer] bfloat16 or null, output [tokens, outer] bfloat16.
// All contiguous; tokens at most MAX_TOKENS. Returns 0, or 1 if there are too many tokens.
extern "C" int linear_bf16(const float* input, const uint16_t* weight, const uint16_t* bias, uint16_t* output, int64_t tokens,
                           int64_t inner, int64_t outer) {
    constexpr int MAX_TOKENS = 16;  // as in kernels/linear.py
    if (tokens > MAX_TOKENS) return 1;
    multiply<MAX_TOKENS>(input, weight, tokens, inner, outer, [&](int64_t t, int64_t n, float sum) {
        output[t * outer + n] = narrow(sum + (bias ? widen(bias[n]) : 0.0f));
    });
    return 0;
}
