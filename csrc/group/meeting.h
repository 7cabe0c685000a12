// Sums and exchanges of processes on one machine, through memory that all of them map.
//
// Every member makes the same calls in the same order. A call is one or more rounds: each member
// writes to a slot of its own, posts the number of the round, waits until all have posted it, and
// reads what it needs. There are two slots for each member, used in turn: whoever writes one again
// has seen all others post the round between, and they posted it after they had read.
//
// Sums are formed in the order of the members, so all get the same bits, whatever the size of the
// tensor and wherever a value lies in it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "group/word.h"

namespace nodeserve::group {

class Meeting {
  public:
    static std::size_t memory_bytes(std::size_t size, std::size_t slot_bytes) {
        return size * (sizeof(Word) + 2 * slot_bytes);
    }

    // `memory` is zero before the first member opens it, and the same size for all.
    Meeting(std::span<std::byte> memory, int rank, int size, double timeout_s)
        : posted_(reinterpret_cast<Word*>(memory.data())),
          slots_(memory.data() + size * sizeof(Word)),
          slot_bytes_((memory.size() / size - sizeof(Word)) / 2 / kLine * kLine),
          rank_(rank),
          size_(size),
          timeout_(seconds(timeout_s)) {}

    // x becomes the sum of everybody's.
    void all_reduce(float* x, std::size_t count) {
        const std::size_t most = slot_bytes_ / sizeof(float);
        for (std::size_t first = 0; first < count; first += most) {
            const std::size_t num_values = std::min(most, count - first);
            std::memcpy(begin_round(), x + first, num_values * sizeof(float));
            end_round();
            add_up(x + first, num_values);
        }
    }

    // Everybody's x, one behind the other, into `out`, which is null but on member 0.
    void gather(const std::byte* x, std::size_t num_bytes, std::byte* out) {
        for (std::size_t first = 0; first < num_bytes; first += slot_bytes_) {
            const std::size_t part = std::min(slot_bytes_, num_bytes - first);
            std::memcpy(begin_round(), x + first, part);
            end_round();
            for (int member = 0; out != nullptr && member < size_; ++member) {
                std::memcpy(out + member * num_bytes + first, slot_of(member), part);
            }
        }
    }

    // The next `given[r]` bytes of x to each member r; of `out` the next `taken[r]` from each.
    // std::invalid_argument where two members do not agree on a number.
    void all_to_all(const std::byte* x, const std::vector<std::size_t>& given, std::byte* out,
                    const std::vector<std::size_t>& taken) {
        const std::vector<Given> all = exchange_sizes(given, taken);
        std::size_t most = 0;
        for (const Given& one : all) most = std::max(most, one.total);
        for (std::size_t first = 0; first < most; first += slot_bytes_) {
            const std::size_t total = all[rank_].total;
            std::byte* slot = begin_round();
            if (first < total) std::memcpy(slot, x + first, std::min(slot_bytes_, total - first));
            end_round();
            std::size_t place = 0;
            for (int member = 0; member < size_; ++member) {
                const Given& one = all[member];
                const std::size_t begin = std::max(first, one.start);
                const std::size_t end = std::min(first + slot_bytes_, one.start + one.ours);
                if (begin < end) {
                    std::memcpy(out + place + begin - one.start, slot_of(member) + begin - first, end - begin);
                }
                place += one.ours;
            }
        }
    }

  private:
    struct Given {  // what a member sends
        std::size_t total, start, ours;
    };

    std::byte* slot_of(int member) const { return slots_ + (2 * member + round_ % 2) * slot_bytes_; }

    std::byte* begin_round() {
        ++round_;
        return slot_of(rank_);
    }

    void end_round() {
        posted_[rank_].post(round_);
        for (int member = 0; member < size_; ++member) {
            if (member != rank_ && !posted_[member].wait_for(round_, timeout_)) {
                throw std::runtime_error("member " + std::to_string(member) + " does not come to round " +
                                         std::to_string(round_));
            }
        }
    }

    void add_up(float* x, std::size_t count) const {
        constexpr std::size_t kPart = 4096;  // stays in the nearest cache
        for (std::size_t first = 0; first < count; first += kPart) {
            const std::size_t part = std::min(kPart, count - first);
            float* sum = x + first;
            std::memcpy(sum, slot_of(0) + first * sizeof(float), part * sizeof(float));
            for (int member = 1; member < size_; ++member) {
                const float* more = reinterpret_cast<const float*>(slot_of(member)) + first;
                for (std::size_t i = 0; i < part; ++i) sum[i] += more[i];
            }
        }
    }

    std::vector<Given> exchange_sizes(const std::vector<std::size_t>& given, const std::vector<std::size_t>& taken) {
        const std::size_t row_bytes = size_ * sizeof(std::size_t);
        std::memcpy(begin_round(), given.data(), row_bytes);
        end_round();
        std::vector<Given> all;
        std::vector<std::size_t> row(size_);
        for (int member = 0; member < size_; ++member) {
            std::memcpy(row.data(), slot_of(member), row_bytes);
            Given one{0, 0, row[rank_]};
            for (int target = 0; target < size_; ++target) {
                if (target == rank_) one.start = one.total;
                one.total += row[target];
            }
            if (one.ours != taken[member]) {
                throw std::invalid_argument("member " + std::to_string(member) + " gives " + std::to_string(one.ours) +
                                            " bytes, expected are " + std::to_string(taken[member]));
            }
            all.push_back(one);
        }
        return all;
    }

    Word* posted_;  // of each member: the last round that it has written
    std::byte* slots_;
    std::size_t slot_bytes_;
    int rank_, size_;
    Clock::duration timeout_;
    std::uint32_t round_ = 0;
};

}  // namespace nodeserve::group
