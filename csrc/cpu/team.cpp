#include "cpu/team.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace nodeserve::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(50);

void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until the value is no longer `old`.
uint32_t await_change(const std::atomic<uint32_t>& value, uint32_t old) {
    const auto give_up = Clock::now() + kSpin;
    do {
        for (int i = 0; i < 64; ++i) {
            const uint32_t now = value.load(std::memory_order_acquire);
            if (now != old) return now;
            relax();
        }
    } while (Clock::now() < give_up);
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
}

bool pin(std::thread& thread, int cpu) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return pthread_setaffinity_np(thread.native_handle(), sizeof set, &set) == 0;
}

}  // namespace

Team::Team(int num_threads, std::vector<int> cpus) : num_threads_(num_threads) {
    if (num_threads < 1 || num_threads > 1024)
        throw std::invalid_argument("num_threads must be from 1 to 1024, got " +
                                    std::to_string(num_threads));
    if (!cpus.empty() && cpus.size() != static_cast<size_t>(num_threads))
        throw std::invalid_argument("cpus must be empty or name one cpu per thread");
    for (int member = 1; member < num_threads; ++member) {
        threads_.emplace_back([this, member] { serve(member); });
        if (cpus.empty() || pin(threads_.back(), cpus[static_cast<size_t>(member)])) continue;
        join();
        throw std::invalid_argument("cpus: cannot run on cpu " +
                                    std::to_string(cpus[static_cast<size_t>(member)]));
    }
}

void Team::join() {
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
}

void Team::run_all(Body body, void* context, int num_chunks) {
    body_ = body;
    context_ = context;
    left_.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    claim_.store(uint64_t{epoch} << 32 | static_cast<uint64_t>(num_chunks) << 16, std::memory_order_release);
    epoch_.store(epoch, std::memory_order_release);
    epoch_.notify_all();  // no system call unless a member sleeps
    work(0);
    for (uint32_t left = left_.load(std::memory_order_acquire); left != 0;)
        left = await_change(left_, left);
}

void Team::work(int member) {
    for (;;) {
        const uint64_t claim = claim_.fetch_add(1, std::memory_order_acquire);
        const int chunk = static_cast<int>(claim & 0xffff), num_chunks = static_cast<int>(claim >> 16 & 0xffff);
        if (chunk >= num_chunks) return;
        body_(context_, member, chunk);
        if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
    }
}

void Team::serve(int member) {
    uint32_t seen = 0;
    for (;;) {
        seen = await_change(epoch_, seen);
        if (stop_.load(std::memory_order_relaxed)) return;
        work(member);
    }
}

}  // namespace nodeserve::cpu
