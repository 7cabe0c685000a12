// Memory that pages lie in: our own pool, a peer's pool, and host memory that a GPU may read.
//
// close() is the way to give memory back: it waits for the work that still uses it and reports what
// goes wrong. The destructors are for objects that were dropped: they say nothing and never throw,
// also when CUDA has been shut down before them. One thread at a time uses an object.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace nodeserve::kv {

using Address = std::uintptr_t;

// The device's own grain: a smaller allocation may share its piece of memory with others, and an
// exported handle would then show them to the peer as well.
inline constexpr std::size_t kPoolGrainBytes = std::size_t{2} << 20;
inline constexpr std::size_t kHostPageBytes = 4096;

// Zeroed device memory of one allocation, so that one handle exports all of it.
class Pool {
  public:
    Pool(int device, std::int64_t num_bytes);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int device() const { return device_; }
    std::size_t num_bytes() const { return num_bytes_; }
    Address address() const { return reinterpret_cast<Address>(open_memory()); }
    std::string handle() const;
    void close();

  private:
    void* open_memory() const;
    void clear();

    int device_;
    std::size_t num_bytes_;
    void* memory_ = nullptr;
};

// A pool that another process exported. Its owner must stay alive and keep it until this is closed.
class PeerPool {
  public:
    PeerPool(int device, const std::string& handle, std::int64_t num_bytes);
    ~PeerPool();
    PeerPool(const PeerPool&) = delete;
    PeerPool& operator=(const PeerPool&) = delete;

    std::size_t num_bytes() const { return num_bytes_; }
    Address address() const;
    void close();

  private:
    int device_;
    std::size_t num_bytes_;
    void* memory_ = nullptr;
};

// Host memory that stays the caller's, pinned and readable by every device. The caller unmaps it
// after close().
class HostPages {
  public:
    HostPages(Address address, std::int64_t num_bytes, int device);
    ~HostPages();
    HostPages(const HostPages&) = delete;
    HostPages& operator=(const HostPages&) = delete;

    std::size_t num_bytes() const { return num_bytes_; }
    Address address() const;  // what the device calls it
    void close();

  private:
    int device_;
    std::size_t num_bytes_;
    void* host_ = nullptr;
    void* mapped_ = nullptr;
};

}  // namespace nodeserve::kv
