#include "kv/pool.h"

#include <cstring>
#include <limits>
#include <utility>

#include "check.h"
#include "kv/device.h"
#include "kv/stream.h"

namespace nodeserve::kv {
namespace {

std::size_t checked_bytes(std::int64_t num_bytes) {
    constexpr auto kMost = std::numeric_limits<std::int64_t>::max() / 2;
    NS_REQUIRE(num_bytes > 0 && num_bytes <= kMost && num_bytes % 16 == 0,
               "num_bytes must be a positive multiple of 16, got " << num_bytes);
    return static_cast<std::size_t>(num_bytes);
}

std::size_t in_grains(std::size_t num_bytes) {
    return (num_bytes + kPoolGrainBytes - 1) / kPoolGrainBytes * kPoolGrainBytes;
}

}  // namespace

Pool::Pool(int device, std::int64_t num_bytes) : device_(device), num_bytes_(checked_bytes(num_bytes)) {
    require_device(device);
    const OnDevice current(device_);
    NS_CUDA(cudaMalloc(&memory_, in_grains(num_bytes_)));
    try {
        clear();
    } catch (...) {
        static_cast<void>(cudaFree(memory_));
        throw;
    }
}

Pool::~Pool() {
    if (memory_) static_cast<void>(cudaFree(memory_));
}

// Zeros, because attention multiplies what a page holds beyond its tokens by 0, and 0 * NaN is NaN.
void Pool::clear() {
    Stream stream(device_, false);
    NS_CUDA(cudaMemsetAsync(memory_, 0, num_bytes_, stream.get()));
    stream.synchronize();
    stream.close();
}

void* Pool::open_memory() const {
    NS_REQUIRE(memory_, "the pool is closed: make a new one");
    return memory_;
}

std::string Pool::handle() const {
    const OnDevice current(device_);
    cudaIpcMemHandle_t handle;
    NS_CUDA(cudaIpcGetMemHandle(&handle, open_memory()));
    return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

void Pool::close() {
    if (!memory_) return;
    const OnDevice current(device_);
    NS_CUDA(cudaFree(std::exchange(memory_, nullptr)));
}

PeerPool::PeerPool(int device, const std::string& handle, std::int64_t num_bytes)
    : device_(device), num_bytes_(checked_bytes(num_bytes)) {
    cudaIpcMemHandle_t peer;
    NS_REQUIRE(handle.size() == sizeof(peer), "handle must have " << sizeof(peer) << " bytes as Pool.handle() gives them, got "
                                                                  << handle.size());
    require_device(device);
    std::memcpy(&peer, handle.data(), sizeof(peer));
    const OnDevice current(device_);
    NS_CUDA(cudaIpcOpenMemHandle(&memory_, peer, cudaIpcMemLazyEnablePeerAccess));
}

PeerPool::~PeerPool() {
    if (memory_) static_cast<void>(cudaIpcCloseMemHandle(memory_));
}

Address PeerPool::address() const {
    NS_REQUIRE(memory_, "the peer's pool is closed: open its handle again");
    return reinterpret_cast<Address>(memory_);
}

void PeerPool::close() {
    if (!memory_) return;
    const OnDevice current(device_);
    NS_CUDA(cudaIpcCloseMemHandle(std::exchange(memory_, nullptr)));
}

HostPages::HostPages(Address address, std::int64_t num_bytes, int device)
    : device_(device), num_bytes_(checked_bytes(num_bytes)) {
    NS_REQUIRE(address != 0 && address % kHostPageBytes == 0,
               "address must be the start of a mapping (a multiple of " << kHostPageBytes << "), got " << address);
    require_device(device);
    const OnDevice current(device_);
    void* const host = reinterpret_cast<void*>(address);
    NS_CUDA(cudaHostRegister(host, num_bytes_, cudaHostRegisterPortable | cudaHostRegisterMapped));
    const cudaError_t mapped = cudaHostGetDevicePointer(&mapped_, host, 0);
    if (mapped != cudaSuccess) static_cast<void>(cudaHostUnregister(host));
    check_cuda(mapped, "cudaHostGetDevicePointer", __FILE__, __LINE__);
    host_ = host;
}

HostPages::~HostPages() {
    if (host_) static_cast<void>(cudaHostUnregister(host_));
}

Address HostPages::address() const {
    NS_REQUIRE(host_, "the host pages are closed: register the memory again");
    return reinterpret_cast<Address>(mapped_);
}

void HostPages::close() {
    if (!host_) return;
    const OnDevice current(device_);
    NS_CUDA(cudaHostUnregister(std::exchange(host_, nullptr)));
}

}  // namespace nodeserve::kv
