#include "runtime.h"

using namespace fake_cuda;

namespace {

struct Words {
    cudaError_t error;
    const char* name;
    const char* text;
};

constexpr Words kWords[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorDeviceUninitialized, "cudaErrorDeviceUninitialized", "invalid device context"},
    {cudaErrorMapBufferObjectFailed, "cudaErrorMapBufferObjectFailed", "mapping of buffer object failed"},
    {cudaErrorPeerAccessUnsupported, "cudaErrorPeerAccessUnsupported", "peer access is not supported between these two devices"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
};

constexpr int kMultiProcessors = 8;

bool exists(const Runtime& rt, int device) { return device >= 0 && device < static_cast<int>(rt.settings.devices.size()); }

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
    for (const Words& words : kWords)
        if (words.error == error) return words.name;
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
    for (const Words& words : kWords)
        if (words.error == error) return words.text;
    return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
    FAKE_ENTER("cudaGetDeviceCount");
    *count = static_cast<int>(rt.settings.devices.size());
    return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* device) {
    FAKE_ENTER("cudaGetDevice");
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    FAKE_ENTER("cudaSetDevice");
    if (!exists(rt, device)) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    FAKE_ENTER("cudaDeviceGetAttribute");
    if (!exists(rt, device)) return cudaErrorInvalidDevice;
    if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
    *value = kMultiProcessors;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    FAKE_ENTER("cudaDeviceCanAccessPeer");
    if (!exists(rt, device) || !exists(rt, peer)) return cudaErrorInvalidDevice;
    const auto physical = [&](int logical) { return rt.settings.devices[static_cast<std::size_t>(logical)]; };
    *can = device != peer && rt.settings.can_access(physical(device), physical(peer));
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    FAKE_ENTER("cudaDeviceGetStreamPriorityRange");
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
