// Messages from one process to another, through memory that both map: what a stage of a pipeline
// sends to the next one.
//
// A ring of lines of 64 bytes. A message is a line with its length and the bytes behind it, padded to
// whole lines; one that is larger than the ring goes through it in pieces. Only the sender writes
// `sent`, only the receiver `taken`; both count lines, and the place of a line is its count in turns
// of the ring. The sender waits while the ring is full, the receiver while it is empty, as word.h says.
// Whoever is killed leaves the other waiting, like a collective.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>

#include "group/word.h"

namespace nodeserve::group {

// One end: it either sends or receives.
class Pipe {
  public:
    static constexpr std::size_t kMaxRoom = kLine << 30;  // so that counts of lines can be compared

    // `room_bytes` is for lengths too, and a multiple of kLine.
    static std::size_t memory_bytes(std::size_t room_bytes) { return 2 * sizeof(Word) + room_bytes; }

    // `memory` is zero before the first end opens it, the same for both, with room for two lines at least:
    // a length is told together with what follows it.
    Pipe(std::span<std::byte> memory, double timeout_s)
        : sent_(reinterpret_cast<Word*>(memory.data())),
          taken_(sent_ + 1),
          lines_(memory.data() + 2 * sizeof(Word)),
          num_lines_(static_cast<std::uint32_t>((memory.size() - 2 * sizeof(Word)) / kLine)),
          timeout_(seconds(timeout_s)) {}

    void send(const std::byte* x, std::size_t num_bytes) {
        const std::uint64_t length = num_bytes;
        put(reinterpret_cast<const std::byte*>(&length), sizeof(length));
        put(x, num_bytes);
        sent_->post(count_);
    }

    // std::invalid_argument where the message has another length.
    void receive(std::byte* out, std::size_t num_bytes) {
        std::uint64_t length = 0;
        take(reinterpret_cast<std::byte*>(&length), sizeof(length));
        if (length != num_bytes) {
            throw std::invalid_argument("the other end sends " + std::to_string(length) + " bytes, expected are " +
                                        std::to_string(num_bytes));
        }
        take(out, num_bytes);
    }

  private:
    static constexpr std::uint32_t kPiece = 4096;  // lines of a long message that are there before its end

    void put(const std::byte* x, std::size_t num_bytes) {
        for (std::size_t first = 0; first < num_bytes;) {
            await(*taken_, count_ - num_lines_ + 1, "takes nothing");
            const std::uint32_t free = num_lines_ - (count_ - taken_->number());
            const std::size_t part = std::min<std::size_t>(num_bytes - first, piece(free));
            std::memcpy(here(), x + first, part);
            first += part;
            advance(part);
            if (first < num_bytes) sent_->post(count_);
        }
    }

    void take(std::byte* out, std::size_t num_bytes) {
        for (std::size_t first = 0; first < num_bytes;) {
            await(*sent_, count_ + 1, "sends nothing");
            const std::size_t part = std::min<std::size_t>(num_bytes - first, piece(sent_->number() - count_));
            std::memcpy(out + first, here(), part);
            first += part;
            advance(part);
            taken_->post(count_);
        }
    }

    std::byte* here() const { return lines_ + place_ * kLine; }

    // Bytes that can be copied at once of so many lines, from here on.
    std::size_t piece(std::uint32_t lines) const { return std::min({lines, num_lines_ - place_, kPiece}) * kLine; }

    void advance(std::size_t num_bytes) {
        const auto lines = static_cast<std::uint32_t>((num_bytes + kLine - 1) / kLine);
        count_ += lines;
        place_ = (place_ + lines) % num_lines_;
    }

    void await(Word& word, std::uint32_t number, const char* silence) {
        if (!word.wait_for(number, timeout_)) throw std::runtime_error(std::string("the other end ") + silence);
    }

    Word* sent_;
    Word* taken_;
    std::byte* lines_;
    std::uint32_t num_lines_;
    Clock::duration timeout_;
    std::uint32_t count_ = 0;  // lines that this end has sent or taken
    std::uint32_t place_ = 0;  // of the next one
};

}  // namespace nodeserve::group
