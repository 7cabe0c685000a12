// A few threads that work on one kernel at a time; the calling thread is member 0.
//
// Members wait for the next kernel by spinning for some 50 us (kernels of one step follow each other
// within a few), then sleep in the kernel: an idle worker costs nothing. A team of one never
// touches an atomic. run() is for one thread at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace nodeserve::cpu {

class Team {
  public:
    using Body = void (*)(void* context, int member);

    // cpus: empty, or one per member; cpus[0] is the caller's own affair and is not touched.
    Team(int num_threads, std::vector<int> cpus);
    ~Team() { join(); }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return num_threads_; }

    // body(member) on every member; returns when all are done.
    template <class F>
    void run(const F& body) {
        if (num_threads_ == 1) return body(0);
        run_all([](void* context, int member) { (*static_cast<const F*>(context))(member); },
                const_cast<F*>(&body));
    }

  private:
    void run_all(Body body, void* context);
    void serve(int member);
    void join();

    const int num_threads_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<uint32_t> epoch_{0};    // written by the caller only
    alignas(64) std::atomic<uint32_t> running_{0};  // members that have not finished this epoch
    std::vector<std::thread> threads_;
};

}  // namespace nodeserve::cpu
