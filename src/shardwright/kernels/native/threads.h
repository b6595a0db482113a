// Loops cut among threads, without waiting for threads that do not come. One OpenMP region lasts for a whole call: its first thread
// carries the call out, and the others serve: they do pieces of the loops that it publishes. Each has pieces of its own, the same ones in
// every loop of as many; who is done with them takes the last of another's. So on a machine that is busy with other things nobody waits for
// a thread that waits for a core, but only for pieces that were begun.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace shardwright {

constexpr int64_t PIECES_PER_THREAD = 4;  // of a loop: few enough for long runs through memory, many enough for threads to end together
constexpr int64_t UNEVEN_PIECES = 64;     // per thread, where some take much longer than others
constexpr int64_t MOST_PIECES = 0xffff;
constexpr int SPINS = 2000;               // until a waiting thread offers its core to others

inline void wait_a_little(int& spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
    if (++spins > SPINS) sched_yield();
}

// Where one of `parts` parts of so many begins.
inline int64_t start_of(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

class Team {
public:
    explicit Team(int64_t threads) : threads_(threads), left_(threads) {}

    int64_t threads() const { return threads_; }

    // For the leader: f(i) for each i in [0, count), in `pieces` runs.
    template <typename F>
    void share(int64_t count, int64_t pieces, const F& f) {
        run_ = [](const void* function, int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) (*static_cast<const F*>(function))(i);
        };
        function_ = &f;
        count_ = count;
        pieces_ = pieces;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t round = published_.load(std::memory_order_relaxed) + 1;
        for (int64_t t = 0; t < threads_; ++t) {
            const uint64_t first = start_of(pieces, t, threads_), end = start_of(pieces, t + 1, threads_);
            left_[t].pieces.store(round << 32 | first << 16 | end, std::memory_order_release);
        }
        published_.store(round, std::memory_order_release);
        while (claim(0)) {}
        int spins = 0;
        while (done_.load(std::memory_order_acquire) < pieces) wait_a_little(spins);
    }

    // For the others, until the leader dismisses them. idle() is what they do without a piece: a little of it; whether there was any.
    template <typename I>
    void serve(int64_t thread, const I& idle) {
        uint64_t exhausted = 0;
        for (int spins = 0; !dismissed_.load(std::memory_order_acquire);) {
            const uint64_t round = published_.load(std::memory_order_acquire);
            if (round != exhausted) {
                if (claim(thread)) spins = 0;
                else exhausted = round;
            } else if (!idle()) {
                wait_a_little(spins);
            }
        }
    }

    void dismiss() { dismissed_.store(true, std::memory_order_release); }

private:
    struct alignas(64) Left {
        std::atomic<uint64_t> pieces{0};  // round (32 bits), first of those left (16), their end (16)
    };

    // Does a piece, if one is left: the first of the thread's own, or the last of another's. The loop's fields are read once a piece is
    // claimed: it cannot end, nor another begin, before this is done.
    bool claim(int64_t thread) {
        for (int64_t i = 0; i < threads_; ++i) {
            std::atomic<uint64_t>& pieces = left_[(thread + i) % threads_].pieces;
            uint64_t seen = pieces.load(std::memory_order_acquire);
            for (;;) {
                const int64_t first = static_cast<int64_t>(seen >> 16 & 0xffff), end = static_cast<int64_t>(seen & 0xffff);
                if (first >= end) break;
                if (!pieces.compare_exchange_weak(seen, i == 0 ? seen + (1 << 16) : seen - 1, std::memory_order_acquire)) continue;
                const int64_t piece = i == 0 ? first : end - 1;
                run_(function_, start_of(count_, piece, pieces_), start_of(count_, piece + 1, pieces_));
                done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    const int64_t threads_;
    std::vector<Left> left_;  // of each thread
    void (*run_)(const void*, int64_t, int64_t) = nullptr;
    const void* function_ = nullptr;
    int64_t count_ = 0, pieces_ = 0;
    alignas(64) std::atomic<uint64_t> published_{0};  // loops
    alignas(64) std::atomic<int64_t> done_{0};        // pieces
    alignas(64) std::atomic<bool> dismissed_{false};
};

// That of the calling thread while it leads one.
inline Team*& own_team() {
    static thread_local Team* team = nullptr;
    return team;
}

// Which of the threads of a call the calling one is.
struct Seat {
    int64_t thread = 0, threads = 1;
};
inline Seat& own_seat() {
    static thread_local Seat seat;
    return seat;
}

// f() with a team of as many threads as OpenMP gives, which serve the loops in it; idle() is for those that have nothing to do.
template <typename F, typename I>
void lead(const F& f, const I& idle) {
    Team team(omp_in_parallel() ? 1 : omp_get_max_threads());
    if (team.threads() == 1) return f();
#pragma omp parallel
    {
        own_seat() = {omp_get_thread_num(), team.threads()};
        if (own_seat().thread == 0) {
            own_team() = &team;
            f();
            own_team() = nullptr;
            team.dismiss();
        } else {
            team.serve(own_seat().thread, idle);
        }
        own_seat() = {};
    }
}
template <typename F>
void lead(const F& f) {
    lead(f, [] { return false; });
}

// f(i) for each i in [0, count), each once and in any order; cut among the threads of the team if that is worth while.
template <typename F>
void share(int64_t count, bool is_worth, const F& f, int64_t pieces_per_thread = PIECES_PER_THREAD) {
    Team* const team = own_team();
    if (team && is_worth && count > 1) return team->share(count, std::min({count, team->threads() * pieces_per_thread, MOST_PIECES}), f);
    for (int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace shardwright
