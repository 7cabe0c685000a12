// The parts of the fake runtime. Everything is behind one lock; work of streams runs under it too.
//
// In the mode "lazy" nothing runs until somebody waits for it or asks, and then only what that needs:
// a copy that forgot to wait for an event reads what was there before, every time. In the mode
// "threaded" a thread of its own takes the streams in a random order, as a GPU goes on by itself.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace fake_cuda {

// How often an event was recorded, and which of these records the work has reached. Shared between
// processes for an interprocess event.
struct EventCounts {
    std::atomic<std::uint64_t> recorded, reached;
};

// A file of memory without a name; other processes open it through this one's /proc entry.
struct SharedFile {
    int fd = -1;
    std::size_t num_bytes = 0;
    void* memory = nullptr;

    static std::shared_ptr<SharedFile> create(std::size_t num_bytes);
    static std::shared_ptr<SharedFile> open(int process, int fd, std::uint64_t inode, std::size_t num_bytes);
    std::uint64_t inode() const;
    ~SharedFile();
};

struct Handle {
    char magic[8];
    int process, fd, device;  // device: the physical one
    std::uint64_t inode, num_bytes;
};

Handle exported(const char* magic, const SharedFile& file, int device);
cudaError_t import(const char* magic, const Handle& handle, std::shared_ptr<SharedFile>* file);

// A job of a stream: a wait has an event and is over when `count` is reached; others have `run`.
struct Job {
    std::function<void()> run;
    CUevent_st* recorded = nullptr;  // what run() records
    std::shared_ptr<EventCounts> awaited;
    std::uint64_t count = 0;

    bool ready() const { return !awaited || awaited->reached >= count; }
};

struct Allocation {
    std::size_t num_bytes;
    int device;  // logical
    enum Kind { OWN, PEER, HOST } kind;
    std::shared_ptr<SharedFile> file;
};

struct Failure {
    int calls_left, number;
};

struct Settings {
    std::vector<int> devices;  // physical numbers of the visible ones
    std::set<std::pair<int, int>> peers;
    bool all_peers = true, lazy = false;
    std::size_t memory_bytes = std::size_t{1} << 30;
    unsigned seed = 0;

    static Settings from_environment();
    bool can_access(int physical, int peer) const;
};

struct Runtime {
    std::mutex lock;
    std::condition_variable changed;
    Settings settings;
    std::mt19937 random;
    bool thread_runs = false;
    std::vector<std::unique_ptr<CUstream_st>> streams;
    std::set<CUevent_st*> events;
    std::map<std::uintptr_t, Allocation> allocations;
    std::map<std::string, int> calls;
    std::map<std::string, Failure> failures;
    std::vector<std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>> last_batch;  // target, source, bytes
    unsigned last_grid = 0;  // thread blocks of the last launch

    Runtime() { configure(); }
    void configure();  // from the environment; counts and wanted failures begin anew
    bool covers(const void* memory, std::size_t num_bytes) const;
    std::size_t used_bytes(int device) const;
    std::size_t num_pending() const;
    CUstream_st* stream_at(cudaStream_t stream, int device);  // null: no such stream
    void put(CUstream_st* stream, Job job);
    void wait_until(std::unique_lock<std::mutex>& held, const std::function<bool()>& done,
                    const std::function<bool()>& step);
    bool step(CUstream_st* stream);         // false: it waits for another process
    bool step_towards(const EventCounts& counts);
    bool step_any();
    void drain(std::unique_lock<std::mutex>& held);

  private:
    void run_head(CUstream_st* stream);
    void run_for_ever();
};

Runtime& runtime();            // never destroyed: its thread may outlive main
extern thread_local int current_device;

// Counts the call, and is the failure that a test asked for, if this is its turn.
cudaError_t entered(Runtime& runtime, const char* function);

}  // namespace fake_cuda

struct CUstream_st {
    int device;
    bool is_default = false, destroyed = false;
    std::deque<fake_cuda::Job> jobs;
};

struct CUevent_st {
    int device;  // physical
    unsigned flags;
    std::shared_ptr<fake_cuda::SharedFile> file;  // of an interprocess event
    std::shared_ptr<fake_cuda::EventCounts> counts;
    std::chrono::steady_clock::time_point reached_at;
    bool opened = false, destroyed = false;
};

// The head of every fake function: takes the lock and answers a failure that a test asked for.
#define FAKE_ENTER(function)                                              \
    auto& rt = fake_cuda::runtime();                                      \
    std::unique_lock held(rt.lock);                                       \
    if (const auto failure = fake_cuda::entered(rt, function)) return failure
