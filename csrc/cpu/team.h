// A few threads that work on one kernel at a time; the calling thread is member 0.
//
// A kernel is dealt out in chunks that members claim as they come: the caller waits for claimed
// chunks only, so a member that the system keeps off its core delays nobody, and the caller alone
// finishes everything. (Fixed shares waited a time slice for each kernel: with one of two cores
// busy a step took 25 ms on two threads and 9 on one.)
//
// `claim_` holds epoch, number of chunks and next chunk in one word, so a late member cannot take an
// old number for a new kernel's. Body and context are read after a successful claim: the caller
// cannot publish the next kernel before that chunk is done. Between kernels members spin for some
// 50 us (kernels of one step follow each other within a few), then sleep: an idle worker costs
// nothing. A team of one never touches an atomic. run() is for one thread at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace nodeserve::cpu {

class Team {
  public:
    using Body = void (*)(void* context, int member, int chunk);

    // cpus: empty, or one per member; cpus[0] is the caller's own affair and is not touched.
    Team(int num_threads, std::vector<int> cpus);
    ~Team() { join(); }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return num_threads_; }

    // body(member, chunk) for each chunk in [0, num_chunks), on whichever member is free.
    template <class F>
    void run(int num_chunks, const F& body) {
        if (num_threads_ == 1 || num_chunks == 1) {
            for (int chunk = 0; chunk < num_chunks; ++chunk) body(0, chunk);
            return;
        }
        run_all([](void* context, int member, int chunk) { (*static_cast<const F*>(context))(member, chunk); },
                const_cast<F*>(&body), num_chunks);
    }

  private:
    void run_all(Body body, void* context, int num_chunks);
    void serve(int member);
    void work(int member);
    void join();

    const int num_threads_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint32_t> epoch_{0};  // what sleeping members wait on
    alignas(64) std::atomic<uint64_t> claim_{0};  // epoch << 32 | num_chunks << 16 | next chunk
    alignas(64) std::atomic<uint32_t> left_{0};   // chunks that are not done
    std::vector<std::thread> threads_;
};

}  // namespace nodeserve::cpu
