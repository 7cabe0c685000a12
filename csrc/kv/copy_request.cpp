#include "kv/copy_request.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "kv/copy_params.h"

namespace nodeserve::kv {
namespace {

constexpr std::int64_t kMaxTiles = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxStride = kUnitBytes * std::numeric_limits<std::int32_t>::max();

bool in_units(std::int64_t value) { return value % kUnitBytes == 0; }

void check_side(const Side& side, const char* name) {
    NS_REQUIRE(side.address != 0 && side.address % kUnitBytes == 0,
               name << " must be an address that is a multiple of 16 and not null, got " << side.address);
    NS_REQUIRE(side.stride > 0 && side.stride <= kMaxStride && in_units(side.stride),
               name << "_stride must be a positive multiple of 16 up to " << kMaxStride << ", got " << side.stride);
    NS_REQUIRE(side.num_bytes > 0 && side.num_bytes % side.stride == 0,
               name << "_bytes must be whole blocks of " << side.stride << " bytes, got " << side.num_bytes);
    NS_REQUIRE(side.address <= std::numeric_limits<std::uintptr_t>::max() - static_cast<std::uintptr_t>(side.num_bytes),
               name << "_bytes: " << side.num_bytes << " bytes from " << side.address << " leave the address space");
}

void check_block(std::int32_t block, const Side& side, std::size_t index, const char* name) {
    const std::int64_t num_blocks = side.num_bytes / side.stride;
    NS_REQUIRE(block >= 0 && block < num_blocks, "pairs[" << index << "]: " << name << " block " << block
                                                          << " is outside the " << num_blocks << " blocks given");
}

void check_run_end(std::int64_t offset, std::int64_t num_bytes, const Side& side, std::size_t index, const char* name) {
    NS_REQUIRE(offset >= 0 && offset <= side.stride && num_bytes <= side.stride - offset,
               "runs[" << index << "]: " << num_bytes << " bytes at " << name << " offset " << offset
                       << " leave the block of " << side.stride << " bytes");
}

void check_run(const Run& run, const CopyRequest& request, std::size_t index) {
    NS_REQUIRE(run.num_bytes > 0, "runs[" << index << "]: its bytes must be positive, got " << run.num_bytes);
    NS_REQUIRE(in_units(run.target) && in_units(run.source) && in_units(run.num_bytes),
               "runs[" << index << "]: offsets and bytes must be multiples of 16, got " << run.target << ", "
                       << run.source << ", " << run.num_bytes);
    check_run_end(run.target, run.num_bytes, request.target, index, "target");
    check_run_end(run.source, run.num_bytes, request.source, index, "source");
}

void check_targets_differ(const CopyRequest& request) {
    for (std::size_t i = 1; i < request.pairs.size(); ++i)
        NS_REQUIRE(request.pairs[i - 1].target != request.pairs[i].target,
                   "pairs: target block " << request.pairs[i].target << " is written twice");
    for (std::size_t i = 1; i < request.runs.size(); ++i)
        NS_REQUIRE(request.runs[i - 1].target + request.runs[i - 1].num_bytes <= request.runs[i].target,
                   "runs: two of them write the bytes at target offset " << request.runs[i].target);
}

// Within one pool: what is read must not be written by the same request.
void check_sides_apart(const CopyRequest& request) {
    const Side &target = request.target, &source = request.source;
    const auto end = [](const Side& side) { return side.address + static_cast<std::uintptr_t>(side.num_bytes); };
    if (end(target) <= source.address || end(source) <= target.address) return;
    std::vector<Segment> written = joined_segments(request), read = written;
    std::ranges::sort(read, {}, &Segment::source);
    // Unsigned, so that a side that begins below the other needs no sign.
    const auto reads = [&](const Segment& s) { return source.address + static_cast<std::uintptr_t>(s.source); };
    const auto writes = [&](const Segment& s) { return target.address + static_cast<std::uintptr_t>(s.target); };
    for (std::size_t w = 0, r = 0; w < written.size() && r < read.size();) {
        const std::uintptr_t write = writes(written[w]), write_end = write + static_cast<std::uintptr_t>(written[w].num_bytes);
        const std::uintptr_t from = reads(read[r]), from_end = from + static_cast<std::uintptr_t>(read[r].num_bytes);
        const std::uintptr_t block = (std::max(write, from) - target.address) / static_cast<std::uintptr_t>(target.stride);
        NS_REQUIRE(write_end <= from || from_end <= write,
                   "pairs: block " << block << " of the target is read by the same request");
        (write_end < from_end ? w : r) += 1;
    }
}

}  // namespace

bool CopyRequest::whole_blocks() const {
    return runs.size() == 1 && runs[0].num_bytes == target.stride && runs[0].num_bytes == source.stride;
}

CopyRequest checked_request(Side target, Side source, std::span<const Pair> pairs, std::span<const Run> runs) {
    check_side(target, "target");
    check_side(source, "source");
    CopyRequest request{target, source, {pairs.begin(), pairs.end()}, {runs.begin(), runs.end()}};
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        check_block(pairs[i].target, target, i, "target");
        check_block(pairs[i].source, source, i, "source");
    }
    for (std::size_t i = 0; i < runs.size(); ++i) check_run(runs[i], request, i);
    std::ranges::sort(request.pairs, {}, &Pair::target);
    std::ranges::sort(request.runs, {}, &Run::target);
    check_targets_differ(request);
    check_sides_apart(request);
    return request;
}

std::vector<Segment> joined_segments(const CopyRequest& request) {
    std::vector<Segment> joined;
    for (const Pair& pair : request.pairs) {
        for (const Run& run : request.runs) {
            const Segment next{pair.target * request.target.stride + run.target,
                               pair.source * request.source.stride + run.source, run.num_bytes};
            if (!joined.empty() && joined.back().target + joined.back().num_bytes == next.target &&
                joined.back().source + joined.back().num_bytes == next.source) {
                joined.back().num_bytes += next.num_bytes;
            } else {
                joined.push_back(next);
            }
        }
    }
    return joined;
}

std::int64_t num_tiles(const Run& run) {
    constexpr std::int64_t kTileBytes = kTileUnits * kUnitBytes;
    return (run.num_bytes + kTileBytes - 1) / kTileBytes;
}

std::vector<Share> shares(const CopyRequest& request, std::size_t num_words) {
    const std::size_t max_runs = num_words / 2 / kRunWords;
    std::vector<Share> all;
    for (std::size_t first_run = 0; first_run < request.runs.size(); first_run += max_runs) {
        const std::size_t num_runs = std::min(max_runs, request.runs.size() - first_run);
        std::int64_t tiles = 0;
        for (std::size_t i = 0; i < num_runs; ++i) tiles += num_tiles(request.runs[first_run + i]);
        const std::size_t room = (num_words - num_runs * kRunWords) / kPairWords;
        const std::size_t max_pairs = std::min(room, static_cast<std::size_t>(kMaxTiles / tiles));
        for (std::size_t first_pair = 0; first_pair < request.pairs.size(); first_pair += max_pairs)
            all.push_back({first_run, num_runs, first_pair, std::min(max_pairs, request.pairs.size() - first_pair)});
    }
    return all;
}

}  // namespace nodeserve::kv
