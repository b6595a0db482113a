// Products of instructions with packed weights, whatever these are kept as.

#pragma once

#include "instructions.h"
#include "stream.h"

namespace shardwright {

// out [M, N] = x [M, K] @ weight.T + bias [N], float32, for `count` instructions that follow each other and have the same x. `reading` is that
// of their weights in a step that reads others before and after, or null.
void linears(const Instruction* instructions, int count, const Reading* reading);
void coded_linears(const Instruction* instructions, int count, const Reading* reading);

// Where the weight of an instruction lies, as it will be read.
Panels panels_of(const Instruction& in);
Panels coded_panels_of(const Instruction& in);

// Bytes of a weight are codes, of so many bits and with a group size, or else bfloat16 in 12 bits.
inline int64_t group_size_of(const Instruction& in) { return in.value[1]; }
inline int64_t code_bits_of(const Instruction& in) { return in.value[2]; }
inline bool has_codes(const Instruction& in) { return in.tensor[2].type == U8 && code_bits_of(in); }

}  // namespace shardwright
