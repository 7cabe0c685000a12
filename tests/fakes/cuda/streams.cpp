#include <algorithm>
#include <cstring>
#include <numeric>

#include "runtime.h"

using namespace fake_cuda;

#define FAKE_STREAM(name, given)                              \
    CUstream_st* const name = rt.stream_at(given, current_device); \
    if (!name) return cudaErrorInvalidResourceHandle
#define FAKE_EVENT(event) \
    if (!rt.events.contains(event) || event->destroyed) return cudaErrorInvalidResourceHandle

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    FAKE_ENTER("cudaStreamCreateWithPriority");
    if (flags != cudaStreamNonBlocking || priority > 0 || priority < -5) return cudaErrorInvalidValue;
    rt.streams.push_back(std::make_unique<CUstream_st>());
    *stream = rt.streams.back().get();
    (*stream)->device = current_device;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t given) {
    FAKE_ENTER("cudaStreamDestroy");
    FAKE_STREAM(stream, given);
    stream->destroyed = true;  // its jobs still run, as CUDA promises
    return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t given, int* device) {
    FAKE_ENTER("cudaStreamGetDevice");
    FAKE_STREAM(stream, given);
    *device = stream->device;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t given) {
    FAKE_ENTER("cudaStreamSynchronize");
    FAKE_STREAM(stream, given);
    rt.wait_until(held, [&] { return stream->jobs.empty(); }, [&] { return rt.step(stream); });
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t given, cudaEvent_t event, unsigned) {
    FAKE_ENTER("cudaStreamWaitEvent");
    FAKE_STREAM(stream, given);
    FAKE_EVENT(event);
    Job job;
    job.awaited = event->counts;
    job.count = event->counts->recorded;
    rt.put(stream, std::move(job));
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    FAKE_ENTER("cudaEventCreateWithFlags");
    const bool shared = flags & cudaEventInterprocess;
    if (shared && !(flags & cudaEventDisableTiming)) return cudaErrorInvalidValue;
    auto made = std::make_unique<CUevent_st>();
    made->device = rt.settings.devices[static_cast<std::size_t>(current_device)];
    made->flags = flags;
    if (shared) {
        made->file = SharedFile::create(sizeof(EventCounts));
        if (!made->file) return cudaErrorMemoryAllocation;
        made->counts = {made->file, new (made->file->memory) EventCounts{}};
    } else {
        made->counts = std::make_shared<EventCounts>();
    }
    *event = made.release();
    rt.events.insert(*event);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    FAKE_ENTER("cudaEventDestroy");
    FAKE_EVENT(event);
    event->destroyed = true;  // jobs that record it may still be under way
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t given) {
    FAKE_ENTER("cudaEventRecord");
    FAKE_EVENT(event);
    FAKE_STREAM(stream, given);
    Job job;
    job.recorded = event;
    job.run = [event, count = ++event->counts->recorded] {
        event->reached_at = std::chrono::steady_clock::now();
        event->counts->reached = std::max<std::uint64_t>(event->counts->reached, count);
    };
    rt.put(stream, std::move(job));
    return cudaSuccess;
}

namespace {

bool is_reached(cudaEvent_t event) { return event->counts->reached >= event->counts->recorded; }

}  // namespace

cudaError_t cudaEventQuery(cudaEvent_t event) {
    FAKE_ENTER("cudaEventQuery");
    FAKE_EVENT(event);
    if (is_reached(event)) return cudaSuccess;
    if (rt.settings.lazy) rt.step_towards(*event->counts);  // whoever keeps asking gets there
    return cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    FAKE_ENTER("cudaEventSynchronize");
    FAKE_EVENT(event);
    rt.wait_until(held, [&] { return is_reached(event); }, [&] { return rt.step_towards(*event->counts); });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* elapsed_ms, cudaEvent_t start, cudaEvent_t end) {
    FAKE_ENTER("cudaEventElapsedTime");
    FAKE_EVENT(start);
    FAKE_EVENT(end);
    if ((start->flags | end->flags) & cudaEventDisableTiming) return cudaErrorInvalidResourceHandle;
    if (!start->counts->recorded || !end->counts->recorded) return cudaErrorInvalidResourceHandle;
    if (!is_reached(start) || !is_reached(end)) return cudaErrorNotReady;
    *elapsed_ms = std::chrono::duration<float, std::milli>(end->reached_at - start->reached_at).count();
    return cudaSuccess;
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
    FAKE_ENTER("cudaIpcGetEventHandle");
    FAKE_EVENT(event);
    if (!event->file || event->opened) return cudaErrorInvalidResourceHandle;
    const Handle filled = exported("event", *event->file, event->device);
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &filled, sizeof(filled));
    return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t given) {
    FAKE_ENTER("cudaIpcOpenEventHandle");
    Handle handle{};
    std::memcpy(&handle, &given, sizeof(handle));
    auto opened = std::make_unique<CUevent_st>();
    if (const auto failure = import("event", handle, &opened->file)) return failure;
    opened->device = handle.device;
    opened->flags = cudaEventDisableTiming | cudaEventInterprocess;
    opened->opened = true;
    opened->counts = {opened->file, static_cast<EventCounts*>(opened->file->memory)};
    *event = opened.release();
    rt.events.insert(*event);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t num_bytes, cudaStream_t given) {
    FAKE_ENTER("cudaMemsetAsync");
    FAKE_STREAM(stream, given);
    if (!rt.covers(memory, num_bytes)) return cudaErrorInvalidValue;
    Job job;
    job.run = [=] { std::memset(memory, value, num_bytes); };
    rt.put(stream, std::move(job));
    return cudaSuccess;
}

cudaError_t cudaMemcpyBatchAsync(void* const* targets, const void* const* sources, const std::size_t* sizes,
                                 std::size_t count, cudaMemcpyAttributes* attributes, std::size_t* first_of_attributes,
                                 std::size_t num_attributes, cudaStream_t given) {
    FAKE_ENTER("cudaMemcpyBatchAsync");
    FAKE_STREAM(stream, given);
    // CUDA takes a stream of another device here; we do not, so that a forgotten one shows.
    if (stream->device != current_device) return cudaErrorInvalidResourceHandle;
    if (stream->is_default || count == 0 || num_attributes != 1 || first_of_attributes[0] != 0) return cudaErrorInvalidValue;
    if (attributes[0].srcAccessOrder != cudaMemcpySrcAccessOrderStream) return cudaErrorInvalidValue;
    rt.last_batch.clear();
    for (std::size_t i = 0; i < count; ++i) {
        if (sizes[i] == 0 || !rt.covers(targets[i], sizes[i]) || !rt.covers(sources[i], sizes[i])) return cudaErrorInvalidValue;
        rt.last_batch.emplace_back(reinterpret_cast<std::uintptr_t>(targets[i]),
                                   reinterpret_cast<std::uintptr_t>(sources[i]), sizes[i]);
    }
    auto copies = rt.last_batch;
    std::ranges::shuffle(copies, rt.random);  // a batch promises no order
    Job job;
    job.run = [copies] {
        for (const auto& [target, source, num_bytes] : copies)
            std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), num_bytes);
    };
    rt.put(stream, std::move(job));
    return cudaSuccess;
}

cudaError_t fake_cuda::launch(dim3 grid, dim3 block, std::function<void()> thread, cudaStream_t given) {
    FAKE_ENTER("cudaLaunchKernel");
    FAKE_STREAM(stream, given);
    if (stream->device != current_device) return cudaErrorInvalidResourceHandle;
    if (grid.x == 0 || block.x == 0 || block.x > 1024) return cudaErrorInvalidValue;
    rt.last_grid = grid.x;
    std::vector<unsigned> order(grid.x);
    std::iota(order.begin(), order.end(), 0u);
    std::ranges::shuffle(order, rt.random);
    Job job;
    job.run = [=] {
        gridDim = grid;
        blockDim = block;
        for (const unsigned index : order)
            for (unsigned lane = 0; lane < block.x; ++lane) {
                blockIdx = dim3(index, 0, 0);
                threadIdx = dim3(lane, 0, 0);
                thread();
            }
    };
    rt.put(stream, std::move(job));
    return cudaSuccess;
}
