// The largest number of each row; see kernels/greedy.py.

#include "exported.h"
#include "threads.h"
#include "vector.h"

namespace shardwright {
namespace {

constexpr int64_t RUN = 1024;  // numbers that are looked at before it is asked where the largest of them is
constexpr int CHAINS = 4;      // of vectors, which hide latency

// The largest of some numbers, and whether any is not a number.
template <typename T>
float largest_of_run(const T* row, int64_t count, bool& is_nan) {
    constexpr int64_t STEP = CHAINS * LANES;
    Vector largest[CHAINS];
    Bits not_numbers{};
    for (Vector& own : largest) own = splat(-INFINITY);
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP)
        for (int c = 0; c < CHAINS; c += 2) {
            Vector numbers[2];
            load_two(row + i + c * LANES, numbers[0], numbers[1]);
            for (int half = 0; half < 2; ++half) {
                largest[c + half] = larger(numbers[half], largest[c + half]);
                not_numbers |= (Bits)(numbers[half] != numbers[half]);
            }
        }
    float lanes[STEP], result = -INFINITY;
    for (int c = 0; c < CHAINS; ++c) put(largest[c], lanes + c * LANES);
    for (const float lane : lanes) result = std::max(result, lane);
    is_nan = false;
    for (int lane = 0; lane < LANES; ++lane) is_nan |= not_numbers[lane] != 0;
    for (; i < count; ++i) {
        const float number = widen(row[i]);
        is_nan |= number != number;
        result = std::max(result, number);
    }
    return result;
}

// The first place of the largest number, or of what is not a number, and whether it is one.
template <typename T>
int64_t place_of_largest(const T* row, int64_t length, bool& is_nan) {
    float largest = -INFINITY;
    int64_t best = 0;
    for (int64_t start = 0; start < length; start += RUN) {
        const T *const own = row + start, *const end = own + std::min(RUN, length - start);
        const float own_largest = largest_of_run(own, end - own, is_nan);
        if (is_nan) return std::find_if(own, end, [](T bits) { return widen(bits) != widen(bits); }) - row;
        if (own_largest > largest) {
            largest = own_largest;
            best = std::find_if(own, end, [=](T bits) { return widen(bits) == own_largest; }) - row;
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
