#include "kv/copy.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "kv/copy_kernel.h"
#include "kv/device.h"

namespace nodeserve::kv {
namespace {

// Launches go to the current device, which must be the stream's.
int device_of(cudaStream_t stream) {
    int device = 0;
    NS_CUDA(cudaStreamGetDevice(stream, &device));
    return device;
}

bool is_in_memory_of(int device, std::uintptr_t address) {
    cudaPointerAttributes found{};
    NS_CUDA(cudaPointerGetAttributes(&found, reinterpret_cast<const void*>(address)));
    return found.type == cudaMemoryTypeDevice && found.device == device;
}

// Whether no byte leaves the device, as between two workers that share one.
bool is_local(const CopyRequest& request, int device) {
    return is_in_memory_of(device, request.target.address) && is_in_memory_of(device, request.source.address);
}

// A quarter keeps a link between devices busy, the device's own memory takes twice as many.
int default_thread_blocks(const CopyRequest& request, int device) {
    int num_multiprocessors = 0;
    NS_CUDA(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return std::max(1, num_multiprocessors / (is_local(request, device) ? 2 : 4));
}

template <class Params>
Params params_of(const CopyRequest& request, const Share& share) {
    Params params{};
    params.target = reinterpret_cast<char*>(request.target.address);
    params.source = reinterpret_cast<const char*>(request.source.address);
    params.target_stride = request.target.stride;
    params.source_stride = request.source.stride;
    params.num_runs = static_cast<std::uint32_t>(share.num_runs);
    params.num_pairs = static_cast<std::uint32_t>(share.num_pairs);
    std::uint32_t* next = params.words;
    const auto put = [&](std::int64_t value) { *next++ = static_cast<std::uint32_t>(value); };
    std::int64_t tiles = 0;
    for (std::size_t i = 0; i < share.num_runs; ++i) {
        const Run& run = request.runs[share.first_run + i];
        put(run.target / kUnitBytes);
        put(run.source / kUnitBytes);
        put(run.num_bytes / kUnitBytes);
        put(tiles);
        tiles += num_tiles(run);
    }
    for (std::size_t i = 0; i < share.num_pairs; ++i) {
        put(request.pairs[share.first_pair + i].target);
        put(request.pairs[share.first_pair + i].source);
    }
    params.tiles_per_block = static_cast<std::uint32_t>(tiles);
    params.num_tiles = static_cast<std::uint32_t>(tiles * static_cast<std::int64_t>(share.num_pairs));
    return params;
}

template <class Params>
int launch_all(const CopyRequest& request, const std::vector<Share>& parts, int max_thread_blocks, cudaStream_t stream) {
    constexpr std::uint32_t kWarps = kThreads / kLanes;
    for (const Share& share : parts) {
        const auto params = params_of<Params>(request, share);
        const std::uint32_t needed = (params.num_tiles + kWarps - 1) / kWarps;
        launch_copy(params, std::min(needed, static_cast<std::uint32_t>(max_thread_blocks)), stream);
    }
    return static_cast<int>(parts.size());
}

int copy_by_kernel(const CopyRequest& request, int max_thread_blocks, cudaStream_t stream) {
    const int device = device_of(stream);
    const OnDevice current(device);
    if (max_thread_blocks == 0) max_thread_blocks = default_thread_blocks(request, device);
    const auto small = shares(request, SmallCopy::kNumWords);
    if (small.size() == 1) return launch_all<SmallCopy>(request, small, max_thread_blocks, stream);
    return launch_all<LargeCopy>(request, shares(request, LargeCopy::kNumWords), max_thread_blocks, stream);
}

int copy_by_batch(const CopyRequest& request, cudaStream_t stream) {
    std::vector<void*> targets, sources;
    std::vector<std::size_t> sizes;
    for (const Segment& segment : joined_segments(request)) {
        targets.push_back(reinterpret_cast<char*>(request.target.address) + segment.target);
        sources.push_back(reinterpret_cast<char*>(request.source.address) + segment.source);
        sizes.push_back(static_cast<std::size_t>(segment.num_bytes));
    }
    const OnDevice current(device_of(stream));
    // One set of attributes for all copies, from copy 0 on. Sources are read in stream order: they
    // may be written by work that the stream waits for. The flag asks for the copy engines, so that
    // the multiprocessors stay with the step. Location hints are for managed memory only.
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    std::size_t first = 0;
#if CUDART_VERSION >= 13000
    NS_CUDA(cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), sizes.size(), &attributes, &first, 1, stream));
#else
    std::size_t failed = 0;
    NS_CUDA(cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), sizes.size(), &attributes, &first, 1, &failed,
                                 stream));
#endif
    return 1;
}

Method best_method(const CopyRequest& request, StreamHandle handle) {
    if (!request.whole_blocks() || is_legacy(handle)) return Method::KERNEL;
    return is_local(request, device_of(stream_from(handle))) ? Method::KERNEL : Method::BATCH;
}

}  // namespace

int copy_pages(const CopyRequest& request, StreamHandle handle, Method method, int max_thread_blocks) {
    const cudaStream_t stream = stream_from(handle);
    NS_REQUIRE(max_thread_blocks >= 0, "max_thread_blocks must be positive, or 0 for the default, got " << max_thread_blocks);
    NS_REQUIRE(method != Method::BATCH || !is_legacy(handle),
               "method \"batch\" needs a stream of its own: CUDA takes no batched copies on the default stream");
    if (request.pairs.empty() || request.runs.empty()) return 0;
    if (method == Method::AUTO) method = best_method(request, handle);
    return method == Method::BATCH ? copy_by_batch(request, stream) : copy_by_kernel(request, max_thread_blocks, stream);
}

}  // namespace nodeserve::kv
