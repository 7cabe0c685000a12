// Streams and events of our own. Everything else takes a stream as its raw handle, so work can be
// put on torch's streams as well.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace nodeserve::kv {

using StreamHandle = std::uintptr_t;

// BadArgument for what cannot be a cudaStream_t; 0, 1 and 2 are CUDA's names for default streams.
cudaStream_t stream_from(StreamHandle handle);

// The legacy default stream waits for all others; batched copies are not allowed on it.
inline bool is_legacy(StreamHandle handle) { return handle <= 1; }

// It does not wait for the default stream. close() lets work that is under way finish.
class Stream {
  public:
    Stream(int device, bool high_priority);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t get() const;
    void synchronize() const;
    void close();

  private:
    cudaStream_t stream_ = nullptr;
};

// A point in a stream's work. Before the first record it counts as done. An opened event is valid
// as long as its owner keeps its own.
class Event {
  public:
    Event(int device, bool interprocess, bool timed);
    Event(int device, const std::string& handle);  // a peer's
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    std::string handle() const;
    void record(StreamHandle stream);
    void make_wait(StreamHandle stream) const;  // later work of the stream, not the caller
    bool done() const;
    void synchronize() const;
    float elapsed_ms(const Event& earlier) const;
    void close();

  private:
    cudaEvent_t get() const;

    cudaEvent_t event_ = nullptr;
    bool exportable_;
    bool timed_;
};

}  // namespace nodeserve::kv
