#include "kv/stream.h"

#include <cstring>
#include <utility>

#include "check.h"
#include "kv/device.h"

namespace nodeserve::kv {

cudaStream_t stream_from(StreamHandle handle) {
    NS_REQUIRE(handle <= 2 || (handle % 8 == 0 && handle >= 4096),
               "stream must be a cudaStream_t as Stream.handle or torch.cuda.Stream.cuda_stream give it, got " << handle);
    return reinterpret_cast<cudaStream_t>(handle);
}

Stream::Stream(int device, bool high_priority) {
    require_device(device);
    const OnDevice current(device);
    int lowest = 0, highest = 0;
    NS_CUDA(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    NS_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, high_priority ? highest : lowest));
}

Stream::~Stream() {
    if (stream_) static_cast<void>(cudaStreamDestroy(stream_));
}

cudaStream_t Stream::get() const {
    NS_REQUIRE(stream_, "the stream is closed: make a new one");
    return stream_;
}

void Stream::synchronize() const { NS_CUDA(cudaStreamSynchronize(get())); }

void Stream::close() {
    if (stream_) NS_CUDA(cudaStreamDestroy(std::exchange(stream_, nullptr)));
}

Event::Event(int device, bool interprocess, bool timed) : exportable_(interprocess), timed_(timed) {
    NS_REQUIRE(!(interprocess && timed), "timed must be False for an interprocess event: CUDA cannot time those");
    require_device(device);
    const OnDevice current(device);
    // Who waits sleeps: CUDA's own way is to spin on a core for as long as it lasts.
    unsigned flags = cudaEventBlockingSync;
    if (!timed) flags |= cudaEventDisableTiming;
    if (interprocess) flags |= cudaEventInterprocess;
    NS_CUDA(cudaEventCreateWithFlags(&event_, flags));
}

Event::Event(int device, const std::string& handle) : exportable_(false), timed_(false) {
    cudaIpcEventHandle_t peer;
    NS_REQUIRE(handle.size() == sizeof(peer), "handle must have " << sizeof(peer) << " bytes as Event.handle() gives them, got "
                                                                  << handle.size());
    require_device(device);
    std::memcpy(&peer, handle.data(), sizeof(peer));
    const OnDevice current(device);
    NS_CUDA(cudaIpcOpenEventHandle(&event_, peer));
}

Event::~Event() {
    if (event_) static_cast<void>(cudaEventDestroy(event_));
}

cudaEvent_t Event::get() const {
    NS_REQUIRE(event_, "the event is closed: make a new one");
    return event_;
}

std::string Event::handle() const {
    const cudaEvent_t event = get();
    NS_REQUIRE(exportable_, "the event has no handle: only its owner exports it, made with interprocess=True");
    cudaIpcEventHandle_t handle;
    NS_CUDA(cudaIpcGetEventHandle(&handle, event));
    return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

void Event::record(StreamHandle stream) {
    const cudaEvent_t event = get();
    NS_CUDA(cudaEventRecord(event, stream_from(stream)));
}

void Event::make_wait(StreamHandle stream) const {
    const cudaEvent_t event = get();
    NS_CUDA(cudaStreamWaitEvent(stream_from(stream), event, 0));
}

bool Event::done() const {
    const cudaError_t state = cudaEventQuery(get());
    if (state == cudaErrorNotReady) {
        cudaGetLastError();
        return false;
    }
    check_cuda(state, "cudaEventQuery", __FILE__, __LINE__);
    return true;
}

void Event::synchronize() const { NS_CUDA(cudaEventSynchronize(get())); }

float Event::elapsed_ms(const Event& earlier) const {
    const cudaEvent_t end = get(), start = earlier.get();
    NS_REQUIRE(timed_ && earlier.timed_, "elapsed_ms needs two events made with timed=True");
    float elapsed_ms = 0;
    NS_CUDA(cudaEventElapsedTime(&elapsed_ms, start, end));
    return elapsed_ms;
}

void Event::close() {
    if (event_) NS_CUDA(cudaEventDestroy(std::exchange(event_, nullptr)));
}

}  // namespace nodeserve::kv
