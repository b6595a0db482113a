// The weights of a step, as a stream from memory. Products of few tokens wait for them, and what lies between products leaves memory idle.
// So threads that find nothing to do, as most of that is too little to be cut, fetch what they will have of the next products; and while a
// product is computed, the rest of its weights is fetched at a pace that has it done by the end, so that memory is busy all the time.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "vector.h"

namespace shardwright {

constexpr int MOST_JOINED = 8;  // products of the same tokens
constexpr int64_t LEAST_CACHE = 512 << 10;  // the second one, where the system does not tell
constexpr int64_t LINES_AT_ONCE = 16;  // by a thread without a piece, until it looks for one again

// Of inputs that stay in the second cache while panels go by: half of it.
inline int64_t block_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t size = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), LEAST_CACHE);
#else
    static const int64_t size = LEAST_CACHE;
#endif
    return size / 2;
}

// A packed weight: its panels follow each other.
struct Panels {
    const char* data;
    int64_t count, bytes;  // of each
};

// The weights of products that are cut among threads as one.
struct Reading {
    int64_t number;  // no other has the same
    int64_t total;   // of panels; 0 behind the last reading of a step
    int count;
    Panels weights[MOST_JOINED];
};

// What is fetched while a panel is read: so many bytes from there on.
struct Ahead {
    const char* from;
    int64_t bytes;
};

// What one thread fetches of the weights that it is going to read.
class Stream {
public:
    // For a thread without a piece: a little of what it will read next, until `most` bytes are ahead. Returns whether there was any.
    bool fetch(const Reading& next, int64_t most) {
        follow(next);
        if (lead_ >= most || !more()) return false;
        const char* const end = std::min(place_ + LINES_AT_ONCE * LINE, end_);
        lead_ += end - place_;
        for (; place_ < end; place_ += LINE) __builtin_prefetch(place_, 0, 2);
        return true;
    }

    // While panel `panel` of weight `weight` is read, which is panel `item` of all: what is fetched is at least `least` bytes further.
    Ahead beside(const Reading& reading, int64_t item, int weight, int64_t panel, int64_t least) {
        follow(reading);
        const Panels& all = reading.weights[weight];
        const char* const own = all.data + panel * all.bytes;
        if (item < first_ || item >= last_) return {own + least, all.bytes};  // another thread's part
        const int64_t unread = last_ - item;
        lead_ = 0;
        const bool is_behind = weight > weight_ || (weight == weight_ && place_ < own + least);
        if (is_behind) {
            enter(item);
            place_ += least;
        }
        if (!more()) return {own, 0};
        const int64_t unfetched = last_ - entered_ + (end_ - place_ + all.bytes - 1) / all.bytes;
        const int64_t bytes = is_behind ? all.bytes : (all.bytes * std::min(unfetched, unread) / unread + LINE - 1) / LINE * LINE;
        place_ += bytes;
        return {place_ - bytes, bytes};
    }

private:
    void follow(const Reading& reading) {
        if (reading.number == number_) return;
        const Seat& seat = own_seat();
        reading_ = &reading;
        number_ = reading.number;
        first_ = start_of(reading.total, seat.thread, seat.threads);
        last_ = start_of(reading.total, seat.thread + 1, seat.threads);
        entered_ = first_;
        lead_ = 0;
        place_ = end_ = nullptr;
        if (first_ < last_) enter(first_);
    }

    // Goes on with a panel, counted over all weights, and those of its weight that follow.
    void enter(int64_t item) {
        int64_t panel = item;
        for (weight_ = 0; panel >= reading_->weights[weight_].count; ++weight_) panel -= reading_->weights[weight_].count;
        const Panels& all = reading_->weights[weight_];
        entered_ = std::min(item - panel + all.count, last_);
        place_ = all.data + panel * all.bytes;
        end_ = place_ + (entered_ - item) * all.bytes;
    }

    // Whether anything is left, maybe of the next weight.
    bool more() {
        if (place_ < end_) return true;
        if (entered_ >= last_) return false;
        enter(entered_);
        return true;
    }

    const Reading* reading_ = nullptr;
    int64_t number_ = -1, first_ = 0, last_ = 0;  // of its panels, those of the thread
    int64_t entered_ = 0, lead_ = 0;              // panels up to the end of the weight that is being fetched; bytes that are not read yet
    int weight_ = 0;
    const char *place_ = nullptr, *end_ = nullptr;
};

inline Stream& own_stream() {
    static thread_local Stream stream;
    return stream;
}

}  // namespace shardwright
