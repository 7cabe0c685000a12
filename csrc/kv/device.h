// Which devices there are, and making one of them current for a few calls.
#pragma once

#include <cstddef>
#include <utility>

namespace nodeserve::kv {

int device_count();
bool can_access_peer(int device, int peer);
std::pair<std::size_t, std::size_t> memory(int device);  // free, total bytes

// BadArgument unless the device exists; CudaFailure where CUDA itself does not start.
void require_device(int device, const char* name = "device");

// The current device belongs to the thread and is shared with torch, so it is given back.
class OnDevice {
  public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

}  // namespace nodeserve::kv
