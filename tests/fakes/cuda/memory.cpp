// Device memory is memory that has a file descriptor and no name, so a peer can open it and nothing
// is left behind.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "runtime.h"

namespace fake_cuda {

std::shared_ptr<SharedFile> SharedFile::create(std::size_t num_bytes) {
    auto file = std::make_shared<SharedFile>();
    file->num_bytes = num_bytes;
    file->fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (file->fd < 0 || ftruncate(file->fd, static_cast<off_t>(num_bytes)) != 0) return nullptr;
    void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
    if (memory == MAP_FAILED) return nullptr;
    file->memory = memory;
    return file;
}

std::shared_ptr<SharedFile> SharedFile::open(int process, int fd, std::uint64_t inode, std::size_t num_bytes) {
    const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(fd);
    auto file = std::make_shared<SharedFile>();
    file->num_bytes = num_bytes;
    file->fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file->fd < 0 || file->inode() != inode) return nullptr;
    void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
    if (memory == MAP_FAILED) return nullptr;
    file->memory = memory;
    return file;
}

std::uint64_t SharedFile::inode() const {
    struct stat status {};
    fstat(fd, &status);
    return status.st_ino;
}

SharedFile::~SharedFile() {
    if (memory) munmap(memory, num_bytes);
    if (fd >= 0) close(fd);
}

Handle exported(const char* magic, const SharedFile& file, int device) {
    Handle handle{};
    std::strncpy(handle.magic, magic, sizeof(handle.magic) - 1);
    handle.process = getpid();
    handle.fd = file.fd;
    handle.device = device;
    handle.inode = file.inode();
    handle.num_bytes = file.num_bytes;
    return handle;
}

cudaError_t import(const char* magic, const Handle& handle, std::shared_ptr<SharedFile>* file) {
    if (std::strncmp(handle.magic, magic, sizeof(handle.magic)) != 0) return cudaErrorInvalidValue;
    if (handle.process == getpid()) return cudaErrorDeviceUninitialized;
    *file = SharedFile::open(handle.process, handle.fd, handle.inode, handle.num_bytes);
    return *file ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

}  // namespace fake_cuda

using namespace fake_cuda;

static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t));

cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
    FAKE_ENTER("cudaMemGetInfo");
    *total_bytes = rt.settings.memory_bytes;
    *free_bytes = *total_bytes - rt.used_bytes(current_device);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t num_bytes) {
    FAKE_ENTER("cudaMalloc");
    if (num_bytes > rt.settings.memory_bytes - rt.used_bytes(current_device)) return cudaErrorMemoryAllocation;
    auto file = SharedFile::create(num_bytes);
    if (!file) return cudaErrorMemoryAllocation;
    *memory = file->memory;
    // As a device hands it out: with whatever was there.
    std::memset(*memory, 0xA5, std::min(num_bytes, std::size_t{1} << 20));
    rt.allocations[reinterpret_cast<std::uintptr_t>(*memory)] = {num_bytes, current_device, Allocation::OWN, file};
    return cudaSuccess;
}

namespace {

cudaError_t forget(Runtime& rt, std::unique_lock<std::mutex>& held, void* memory, Allocation::Kind kind,
                   cudaError_t otherwise) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    rt.drain(held);
    const auto found = rt.allocations.find(address);
    if (found == rt.allocations.end() || found->second.kind != kind) return otherwise;
    rt.allocations.erase(found);
    return cudaSuccess;
}

}  // namespace

cudaError_t cudaFree(void* memory) {
    FAKE_ENTER("cudaFree");
    return forget(rt, held, memory, Allocation::OWN, cudaErrorInvalidValue);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
    FAKE_ENTER("cudaPointerGetAttributes");
    *attributes = {cudaMemoryTypeUnregistered, -1};  // what CUDA does not know is no mistake
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const auto after = rt.allocations.upper_bound(address);
    if (after == rt.allocations.begin()) return cudaSuccess;
    const auto& [start, allocation] = *std::prev(after);
    if (address - start >= allocation.num_bytes) return cudaSuccess;
    *attributes = {allocation.kind == Allocation::HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice, allocation.device};
    return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
    FAKE_ENTER("cudaIpcGetMemHandle");
    const auto found = rt.allocations.find(reinterpret_cast<std::uintptr_t>(memory));
    if (found == rt.allocations.end() || found->second.kind != Allocation::OWN) return cudaErrorInvalidValue;
    const int physical = rt.settings.devices[static_cast<std::size_t>(found->second.device)];
    const Handle filled = exported("memory", *found->second.file, physical);
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &filled, sizeof(filled));
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t given, unsigned flags) {
    FAKE_ENTER("cudaIpcOpenMemHandle");
    if (flags != cudaIpcMemLazyEnablePeerAccess) return cudaErrorInvalidValue;
    Handle handle{};
    std::memcpy(&handle, &given, sizeof(handle));
    std::shared_ptr<SharedFile> file;
    if (const auto failure = import("memory", handle, &file)) return failure;
    const int physical = rt.settings.devices[static_cast<std::size_t>(current_device)];
    if (!rt.settings.can_access(physical, handle.device)) return cudaErrorPeerAccessUnsupported;
    *memory = file->memory;
    // It lies where it was made, as far as that device is visible here.
    const auto& visible = rt.settings.devices;
    const auto place = std::ranges::find(visible, handle.device) - visible.begin();
    const int device = place < std::ssize(visible) ? static_cast<int>(place) : -1;
    rt.allocations[reinterpret_cast<std::uintptr_t>(*memory)] = {file->num_bytes, device, Allocation::PEER, file};
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* memory) {
    FAKE_ENTER("cudaIpcCloseMemHandle");
    return forget(rt, held, memory, Allocation::PEER, cudaErrorInvalidValue);
}

cudaError_t cudaHostRegister(void* memory, std::size_t num_bytes, unsigned flags) {
    FAKE_ENTER("cudaHostRegister");
    if (flags != (cudaHostRegisterPortable | cudaHostRegisterMapped)) return cudaErrorInvalidValue;
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    if (rt.allocations.contains(address)) return cudaErrorHostMemoryAlreadyRegistered;
    rt.allocations[address] = {num_bytes, current_device, Allocation::HOST, nullptr};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
    FAKE_ENTER("cudaHostUnregister");
    return forget(rt, held, memory, Allocation::HOST, cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaHostGetDevicePointer(void** mapped, void* memory, unsigned) {
    FAKE_ENTER("cudaHostGetDevicePointer");
    const auto found = rt.allocations.find(reinterpret_cast<std::uintptr_t>(memory));
    if (found == rt.allocations.end() || found->second.kind != Allocation::HOST) return cudaErrorInvalidValue;
    *mapped = memory;
    return cudaSuccess;
}
