#include "kv/device.h"

#include "check.h"

namespace nodeserve::kv {

int device_count() {
    int count = 0;
    NS_CUDA(cudaGetDeviceCount(&count));
    return count;
}

void require_device(int device, const char* name) {
    const int count = device_count();
    NS_REQUIRE(device >= 0 && device < count,
               name << " " << device << " does not exist: this process sees " << count << " device(s), numbered from 0");
}

bool can_access_peer(int device, int peer) {
    require_device(device);
    require_device(peer, "peer");
    if (device == peer) return true;
    int can = 0;
    NS_CUDA(cudaDeviceCanAccessPeer(&can, device, peer));
    return can != 0;
}

std::pair<std::size_t, std::size_t> memory(int device) {
    require_device(device);
    const OnDevice current(device);
    std::size_t free_bytes = 0, total_bytes = 0;
    NS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    return {free_bytes, total_bytes};
}

OnDevice::OnDevice(int device) {
    NS_CUDA(cudaGetDevice(&previous_));
    // Set even when it is current already: a thread that never set one has no context yet.
    NS_CUDA(cudaSetDevice(device));
    changed_ = device != previous_;
}

OnDevice::~OnDevice() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
}

}  // namespace nodeserve::kv
