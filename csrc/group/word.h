// A number in shared memory that one process counts up and others wait for.
//
// Who waits spins for a moment, since processes that compute one step are nearly in time with each
// other, and then sleeps on the word. It announces its sleep before it looks once more, and the other
// stores before it looks for sleepers, all sequentially consistent: one of the two sees the other.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>

namespace nodeserve::group {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kLine = 64;
constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

inline Clock::duration seconds(double count) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

// Begins as zero. Numbers wrap around; those that are compared are less than half of all apart.
class alignas(kLine) Word {
  public:
    std::uint32_t number() const { return number_.load(std::memory_order_acquire); }

    void post(std::uint32_t number) {
        number_.store(number, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) != 0) {
            syscall(SYS_futex, &number_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
        }
    }

    // False: it did not get to `number` in time.
    bool wait_for(std::uint32_t number, Clock::duration timeout) {
        const auto start = Clock::now();
        do {
            for (int turn = 0; turn < 32; ++turn) {
                if (reached(this->number(), number)) return true;
                pause();
            }
        } while (Clock::now() - start < kSpin);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        const bool found = sleep_until(number, start + timeout);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        return found;
    }

  private:
    static bool reached(std::uint32_t seen, std::uint32_t number) {
        return static_cast<std::int32_t>(seen - number) >= 0;
    }

    bool sleep_until(std::uint32_t number, Clock::time_point deadline) {
        for (;;) {
            const std::uint32_t seen = number_.load(std::memory_order_seq_cst);
            if (reached(seen, number)) return true;
            const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
            if (left <= 0) return false;
            const timespec limit{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
            syscall(SYS_futex, &number_, FUTEX_WAIT, seen, &limit, nullptr, 0);
        }
    }

    std::atomic<std::uint32_t> number_;
    std::atomic<std::uint32_t> sleepers_;  // who must be woken when it goes on
};
static_assert(sizeof(Word) == kLine && std::atomic<std::uint32_t>::is_always_lock_free);

}  // namespace nodeserve::group
