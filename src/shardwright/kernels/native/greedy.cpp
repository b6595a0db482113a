// The largest number of each row; see kernels/greedy.py.

#include "exported.h"
#include "threads.h"
#include "vector.h"

namespace shardwright {
namespace {

constexpr int64_t RUN = 1024;  // numbers that are widened at once

// The first place of the largest number, or of what is not a number, and whether it is one.
template <typename T>
int64_t place_of_largest(const T* row, int64_t length, bool& is_nan) {
    float largest = -INFINITY;
    int64_t best = 0;
    for (int64_t start = 0; start < length; start += RUN) {
        const int64_t count = std::min(RUN, length - start);
        alignas(64) float wide[RUN];
        int32_t not_numbers = 0;
        for (int64_t i = 0; i < count; ++i) {
            wide[i] = widen(row[start + i]);
            not_numbers |= wide[i] != wide[i];
        }
        is_nan = not_numbers;
        if (is_nan) return start + (std::find_if(wide, wide + count, [](float x) { return x != x; }) - wide);
        const float own = largest_of(wide, count);
        if (own > largest) {
            largest = own;
            best = start + (std::find(wide, wide + count, own) - wide);
        }
    }
    return best;
}

}  // namespace
}  // namespace shardwright

using namespace shardwright;

// logits [rows, length], `stride` numbers from row to row; is_half: bfloat16 instead of float32. A place of each row, and whether what is
// there is not a number.
EXPORTED void greedy(int64_t is_half, const void* logits, int64_t rows, int64_t length, int64_t stride, int64_t* places, bool* are_nan) {
    const auto one = [&](int64_t r) {
        places[r] = is_half ? place_of_largest(static_cast<const uint16_t*>(logits) + r * stride, length, are_nan[r])
                            : place_of_largest(static_cast<const float*>(logits) + r * stride, length, are_nan[r]);
    };
    if (rows == 1) return one(0);  // sooner done than threads are there
    lead([&] { share(rows, true, one); });
}
