// A request to copy pages, checked, and how it is cut into launches or copies. No CUDA here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace nodeserve::kv {

struct Pair {
    std::int32_t target, source;  // block ids
};

struct Run {
    std::int64_t target, source, num_bytes;  // offsets inside a block
};

// Blocks of `stride` bytes one after the other.
struct Side {
    std::uintptr_t address;
    std::int64_t num_bytes, stride;
};

// Pairs and runs are in the order of their targets, which no two of them share.
struct CopyRequest {
    Side target, source;
    std::vector<Pair> pairs;
    std::vector<Run> runs;

    bool whole_blocks() const;  // each block is one run of all its bytes on both sides
};

// BadArgument, naming the argument, for everything that could touch memory outside the two sides,
// or whose result would depend on the order of the copies.
CopyRequest checked_request(Side target, Side source, std::span<const Pair> pairs, std::span<const Run> runs);

// Bytes from the start of each side.
struct Segment {
    std::int64_t target, source, num_bytes;
};

// All copies of a request, neighbours joined where both sides go on without a gap.
std::vector<Segment> joined_segments(const CopyRequest& request);

// The part of a request that the parameters of one launch hold.
struct Share {
    std::size_t first_run, num_runs, first_pair, num_pairs;
};

std::vector<Share> shares(const CopyRequest& request, std::size_t num_words);

std::int64_t num_tiles(const Run& run);

}  // namespace nodeserve::kv
