// What the copy kernel gets: everything about one launch by value, so nothing has to be uploaded
// first and nothing has to outlive the call.
#pragma once

#include <cstdint>

namespace nodeserve::kv {

inline constexpr std::int64_t kUnitBytes = 16;  // one vector load
inline constexpr std::uint32_t kLanes = 32;
inline constexpr std::uint32_t kLoadsInFlight = 8;  // per thread
inline constexpr std::uint32_t kTileUnits = kLanes * kLoadsInFlight;  // what a warp copies at once: 4 KiB
inline constexpr std::uint32_t kThreads = 512;                        // per thread block

// A run inside a block, in units. first_tile: how many tiles the runs before it have.
struct KernelRun {
    std::uint32_t target, source, num_units, first_tile;
};
inline constexpr std::uint32_t kRunWords = sizeof(KernelRun) / 4;
inline constexpr std::uint32_t kPairWords = 2;  // target block, source block

template <int kParamBytes>
struct CopyParams {
    char* target;
    const char* source;
    std::int64_t target_stride, source_stride;  // bytes
    std::uint32_t num_runs, num_pairs, tiles_per_block, num_tiles;
    static constexpr int kNumWords = (kParamBytes - 48) / 4;
    alignas(16) std::uint32_t words[kNumWords];  // the runs, then the pairs
};

// A launch sends all of its parameters, used or not, so there is a small and a large one. The large
// is the limit of 32,764 bytes (sm_70 and later), rounded down to whole 16 bytes.
using SmallCopy = CopyParams<4096>;
using LargeCopy = CopyParams<32752>;
static_assert(sizeof(SmallCopy) == 4096 && sizeof(LargeCopy) == 32752);

}  // namespace nodeserve::kv
