// Loops cut among threads, without waiting for threads that do not come. One OpenMP region lasts for a whole call: its first thread
// carries the call out, and the others serve: they claim pieces of the loops that it publishes. It claims pieces too, so that on a machine
// that is busy with other things it does the work of threads that wait for a core, and waits only for pieces that were begun.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

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

class Team {
public:
    explicit Team(int64_t threads) : threads_(threads) {}

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
        const uint64_t round = (claims_.load(std::memory_order_relaxed) >> 32) + 1;
        claims_.store(round << 32 | static_cast<uint64_t>(pieces) << 16, std::memory_order_release);
        while (claim()) {}
        int spins = 0;
        while (done_.load(std::memory_order_acquire) < pieces) wait_a_little(spins);
    }

    // For the others, until the leader dismisses them.
    void serve() {
        for (int spins = 0; !dismissed_.load(std::memory_order_acquire);) {
            if (claim()) spins = 0;
            else wait_a_little(spins);
        }
    }

    void dismiss() { dismissed_.store(true, std::memory_order_release); }

private:
    // Does a piece, if one is left. The loop's fields are read once a piece is claimed: it cannot end, nor another begin, before this is done.
    bool claim() {
        uint64_t seen = claims_.load(std::memory_order_acquire);
        do {
            if ((seen & 0xffff) >= (seen >> 16 & 0xffff)) return false;
        } while (!claims_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire));
        const int64_t piece = static_cast<int64_t>(seen & 0xffff);
        run_(function_, count_ * piece / pieces_, count_ * (piece + 1) / pieces_);
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    const int64_t threads_;
    void (*run_)(const void*, int64_t, int64_t) = nullptr;
    const void* function_ = nullptr;
    int64_t count_ = 0, pieces_ = 0;
    alignas(64) std::atomic<uint64_t> claims_{0};  // round (32 bits), pieces of its loop (16), pieces claimed (16)
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<bool> dismissed_{false};
};

// That of the calling thread while it leads one.
inline Team*& own_team() {
    static thread_local Team* team = nullptr;
    return team;
}

// f() with a team of as many threads as OpenMP gives, which serve the loops in it.
template <typename F>
void lead(const F& f) {
    Team team(omp_in_parallel() ? 1 : omp_get_max_threads());
    if (team.threads() == 1) return f();
#pragma omp parallel
    if (omp_get_thread_num() == 0) {
        own_team() = &team;
        f();
        own_team() = nullptr;
        team.dismiss();
    } else {
        team.serve();
    }
}

// f(i) for each i in [0, count), each once and in any order; cut among the threads of the team if that is worth while.
template <typename F>
void share(int64_t count, bool is_worth, const F& f, int64_t pieces_per_thread = PIECES_PER_THREAD) {
    Team* const team = own_team();
    if (team && is_worth && count > 1) return team->share(count, std::min({count, team->threads() * pieces_per_thread, MOST_PIECES}), f);
    for (int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace
