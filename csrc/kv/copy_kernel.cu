// Copies runs of blocks. A warp takes a tile of 4 KiB at a time: a thread has eight 16-byte loads
// in flight before its first store, which is what a long way (a peer's memory) needs to keep a link
// busy with few thread blocks. Tiles belong to warps and not to thread blocks, so that the short
// runs of unequal shards (a few KiB) leave no thread without work.
//
// Loads and stores are marked as streaming: nobody on this device reads the source again, and the
// step that runs meanwhile keeps its lines of the L2 cache.
#include "check.h"
#include "kv/copy_kernel.h"

namespace nodeserve::kv {
namespace {

template <class Params>
__device__ KernelRun run_at(const Params& params, std::uint32_t index) {
    const std::uint32_t* const words = params.words + index * kRunWords;
    return {words[0], words[1], words[2], words[3]};
}

// The last run that begins at or before the tile; the same for a whole warp.
template <class Params>
__device__ KernelRun run_of_tile(const Params& params, std::uint32_t tile) {
    std::uint32_t low = 0, high = params.num_runs;
    while (high - low > 1) {
        const std::uint32_t middle = (low + high) / 2;
        (run_at(params, middle).first_tile <= tile ? low : high) = middle;
    }
    return run_at(params, low);
}

__device__ void copy_units(uint4* __restrict__ target, const uint4* __restrict__ source, std::uint32_t first,
                           std::uint32_t num_units) {
    uint4 held[kLoadsInFlight];
#pragma unroll
    for (std::uint32_t i = 0; i < kLoadsInFlight; ++i)
        if (first + i * kLanes < num_units) held[i] = __ldcs(source + first + i * kLanes);
#pragma unroll
    for (std::uint32_t i = 0; i < kLoadsInFlight; ++i)
        if (first + i * kLanes < num_units) __stcs(target + first + i * kLanes, held[i]);
}

template <class Params>
__device__ void copy_tile(const Params& params, std::uint32_t tile, std::uint32_t lane) {
    const std::uint32_t* const pair = params.words + params.num_runs * kRunWords + tile / params.tiles_per_block * kPairWords;
    const std::uint32_t tile_in_block = tile % params.tiles_per_block;
    const KernelRun run = run_of_tile(params, tile_in_block);
    char* const target = params.target + pair[0] * params.target_stride + run.target * kUnitBytes;
    const char* const source = params.source + pair[1] * params.source_stride + run.source * kUnitBytes;
    copy_units(reinterpret_cast<uint4*>(target), reinterpret_cast<const uint4*>(source),
               (tile_in_block - run.first_tile) * kTileUnits + lane, run.num_units);
}

template <class Params>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Params params) {
    const std::uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
    const std::uint32_t num_warps = gridDim.x * (kThreads / kLanes);
    for (std::uint32_t tile = thread / kLanes; tile < params.num_tiles; tile += num_warps)
        copy_tile(params, tile, thread % kLanes);
}

template <class Params>
void launch(const Params& params, unsigned num_thread_blocks, cudaStream_t stream) {
    void* arguments[] = {const_cast<Params*>(&params)};
    NS_CUDA(cudaLaunchKernel(copy_kernel<Params>, dim3(num_thread_blocks), dim3(kThreads), arguments, 0, stream));
}

}  // namespace

void launch_copy(const SmallCopy& params, unsigned num_thread_blocks, cudaStream_t stream) {
    launch(params, num_thread_blocks, stream);
}

void launch_copy(const LargeCopy& params, unsigned num_thread_blocks, cudaStream_t stream) {
    launch(params, num_thread_blocks, stream);
}

}  // namespace nodeserve::kv
