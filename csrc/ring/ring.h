// Single-producer single-consumer byte ring in memory that two processes share.
//
// Always true: 0 <= head - tail <= capacity. Only the producer writes head, only the consumer writes
// tail. Both count bytes since the beginning, never wrap (64 bit) and are multiples of 8; the place
// of a byte is counter % capacity. A record is a 32-bit length and the payload, padded to 8 bytes;
// where it meets the end of the memory it goes on at the start, in two copies. So every byte can be
// used and there is no "skip" record to get wrong.
//
// A record is published by the store of head after its bytes are there: whoever is killed at any
// instruction leaves whole records or nothing. Nothing here is a lock, so a killed process holds
// nothing up. Space is given back by the store of tail after the bytes were copied out.
//
// Sleeping. The consumer announces its sleep, then looks at head once more; the producer stores
// head, then looks for an announced sleep. Each stores one word and loads the other's, so
// release/acquire would let both miss the other and a wake-up be lost. All four accesses are
// sequentially consistent instead: in their single order one of the two sees the other. (Not
// std::atomic_thread_fence, which says the same but is invisible to the thread sanitizer.) A full
// ring is the same with the roles exchanged.
//
// The peer's counters and lengths are not trusted: every use is checked against the capacity that
// this process keeps to itself, so a damaged ring is a RingError and never a wild copy.
//
// Rejected: a lock (a killed worker keeps it); caching the peer's counter (saves one load of a cache
// line per put, about 1 % of a call from Python, and makes damage visible later).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <span>
#include <stdexcept>
#include <string>

namespace nodeserve::ring {

class RingError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

class RecordTooLarge : public RingError {
    using RingError::RingError;
};

inline constexpr std::uint64_t kMagic = 0x4e53'5249'4e47'0001;  // "NSRING", version 1
// Two cache lines: the hardware fetches lines in pairs, so 64 bytes apart still share.
inline constexpr std::size_t kApart = 128;
inline constexpr std::size_t kAlign = 8;
inline constexpr std::size_t kMinCapacity = 64;
using Length = std::uint32_t;

struct Header {
    std::atomic<std::uint64_t> magic;
    std::uint64_t capacity;
    alignas(kApart) std::atomic<std::uint64_t> head;             // written by the producer
    alignas(kApart) std::atomic<std::uint64_t> tail;             // written by the consumer
    alignas(kApart) std::atomic<std::uint32_t> consumer_sleeps;  // set by the consumer, taken by both
    alignas(kApart) std::atomic<std::uint32_t> producer_waits;   // set by the producer, taken by both
    alignas(kApart) std::atomic<std::uint64_t> beats;            // written by the producer
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
static_assert(std::is_standard_layout_v<Header> && sizeof(Header) % kAlign == 0);

constexpr std::size_t footprint(std::size_t record_bytes) {
    return (sizeof(Length) + record_bytes + kAlign - 1) / kAlign * kAlign;
}

// One end of a ring. It does not own the memory, which must outlive it. Any number of ends may look
// at one memory, but at any time at most one puts and at most one drains.
class Ring {
  public:
    static Ring create(std::span<std::byte> memory) {
        const std::size_t capacity = usable_bytes(memory);
        auto* header = new (memory.data()) Header{};
        header->capacity = capacity;
        header->magic.store(kMagic, std::memory_order_release);
        return {header, capacity};
    }

    static Ring open(std::span<std::byte> memory) {
        const std::size_t capacity = usable_bytes(memory);
        auto* header = std::launder(reinterpret_cast<Header*>(memory.data()));
        if (header->magic.load(std::memory_order_acquire) != kMagic) {
            throw RingError("the memory holds no ring of this version");
        }
        if (header->capacity != capacity) {
            throw RingError("the ring was made for " + std::to_string(header->capacity) +
                            " bytes of records, this memory has " + std::to_string(capacity));
        }
        Ring ring{header, capacity};
        ring.pending_bytes();  // refuses damaged counters at once
        return ring;
    }

    std::size_t capacity() const { return capacity_; }

    std::size_t max_record_bytes() const {
        return std::min<std::size_t>(capacity_ - sizeof(Length), std::numeric_limits<Length>::max());
    }

    // For either end: of the two counters one is the caller's own and stands still.
    std::size_t pending_bytes() const {
        return between(header_->head.load(std::memory_order_acquire),
                       header_->tail.load(std::memory_order_acquire));
    }

    // ---- the producer's side

    // Records written one after the other and published together, or, without publish(), not at all.
    class Batch {
      public:
        explicit Batch(Ring& ring)
            : ring_(ring),
              head_(ring.header_->head.load(std::memory_order_relaxed)),
              // acquire: the consumer has read what we are about to overwrite
              free_(ring.capacity_ -
                    ring.between(head_, ring.header_->tail.load(std::memory_order_acquire))) {}

        // False, and nothing written, when there is no room now.
        bool add(std::span<const std::byte> record) {
            ring_.check_fits(record.size());
            const std::size_t bytes = footprint(record.size());
            if (bytes > free_) return false;
            ring_.write(head_, record);
            head_ += bytes;
            free_ -= bytes;
            return true;
        }

        void publish() { ring_.header_->head.store(head_, std::memory_order_seq_cst); }

      private:
        Ring& ring_;
        std::uint64_t head_;
        std::size_t free_;
    };

    bool put(std::span<const std::byte> record) {
        Batch batch(*this);
        if (!batch.add(record)) return false;
        batch.publish();
        return true;
    }

    // After put: true once for each announced sleep, and then the caller must ring the consumer.
    bool consumer_to_wake() { return take(header_->consumer_sleeps); }

    // True: the wait is announced and the record still has no room. False: there is room.
    bool arm_producer(std::size_t record_bytes) {
        check_fits(record_bytes);
        header_->producer_waits.store(1, std::memory_order_seq_cst);
        const auto tail = header_->tail.load(std::memory_order_seq_cst);
        const auto head = header_->head.load(std::memory_order_relaxed);
        if (footprint(record_bytes) > capacity_ - between(head, tail)) return true;
        disarm_producer();
        return false;
    }

    void disarm_producer() { header_->producer_waits.store(0, std::memory_order_relaxed); }

    void beat() {
        const auto beats = header_->beats.load(std::memory_order_relaxed);
        header_->beats.store(beats + 1, std::memory_order_relaxed);
    }

    std::uint64_t beats() const { return header_->beats.load(std::memory_order_relaxed); }

    // ---- the consumer's side

    // Copies out up to max_records; place(record_bytes) says where the next one goes. The records
    // leave the ring together at the end, so one that throws on the way takes none out.
    template <typename Place>
    std::size_t drain(std::size_t max_records, Place&& place) {
        auto tail = header_->tail.load(std::memory_order_relaxed);
        const auto head = header_->head.load(std::memory_order_acquire);
        std::size_t left = between(head, tail);
        std::size_t num_records = 0;
        for (; left > 0 && num_records < max_records; ++num_records) {
            const std::size_t record_bytes = length_at(tail, left);
            read(tail, {place(record_bytes), record_bytes});
            tail += footprint(record_bytes);
            left -= footprint(record_bytes);
        }
        if (num_records > 0) header_->tail.store(tail, std::memory_order_seq_cst);
        return num_records;
    }

    // After drain: true once for each announced wait, and then the caller must ring the producer.
    bool producer_to_wake() { return take(header_->producer_waits); }

    // True: the sleep is announced and the ring still empty. False: there are records.
    bool arm_consumer() {
        header_->consumer_sleeps.store(1, std::memory_order_seq_cst);
        const auto head = header_->head.load(std::memory_order_seq_cst);
        if (between(head, header_->tail.load(std::memory_order_relaxed)) == 0) return true;
        disarm_consumer();
        return false;
    }

    void disarm_consumer() { header_->consumer_sleeps.store(0, std::memory_order_relaxed); }

  private:
    Ring(Header* header, std::size_t capacity)
        : header_(header),
          data_(reinterpret_cast<std::byte*>(header) + sizeof(Header)),
          capacity_(capacity) {}

    static std::size_t usable_bytes(std::span<std::byte> memory) {
        if (reinterpret_cast<std::uintptr_t>(memory.data()) % alignof(Header) != 0) {
            throw RingError("ring memory must be aligned to " + std::to_string(alignof(Header)));
        }
        if (memory.size() < sizeof(Header) + kMinCapacity) {
            throw RingError("ring memory must have at least " +
                            std::to_string(sizeof(Header) + kMinCapacity) + " bytes, got " +
                            std::to_string(memory.size()));
        }
        return (memory.size() - sizeof(Header)) / kAlign * kAlign;
    }

    // The load keeps the common case, nobody asleep, off the peer's cache line.
    static bool take(std::atomic<std::uint32_t>& announced) {
        return announced.load(std::memory_order_seq_cst) != 0 &&
               announced.exchange(0, std::memory_order_seq_cst) != 0;
    }

    std::size_t between(std::uint64_t head, std::uint64_t tail) const {
        const std::uint64_t pending = head - tail;
        if (pending > capacity_ || (head | tail) % kAlign != 0) {
            throw RingError("damaged ring: head " + std::to_string(head) + ", tail " +
                            std::to_string(tail) + ", capacity " + std::to_string(capacity_));
        }
        return pending;
    }

    void check_fits(std::size_t record_bytes) const {
        if (record_bytes > max_record_bytes()) {
            throw RecordTooLarge("a record of " + std::to_string(record_bytes) +
                                 " bytes; the ring takes at most " +
                                 std::to_string(max_record_bytes()));
        }
    }

    std::size_t length_at(std::uint64_t counter, std::size_t left) const {
        // Loaded once: a peer that writes over it must not change it between check and use. Counter
        // and capacity are multiples of 8, so the length never wraps.
        const auto* place = reinterpret_cast<const Length*>(data_ + counter % capacity_);
        const Length length = __atomic_load_n(place, __ATOMIC_RELAXED);
        if (footprint(length) > left) {
            throw RingError("damaged ring: a record of " + std::to_string(length) +
                            " bytes where " + std::to_string(left) + " are pending");
        }
        return length;
    }

    void write(std::uint64_t counter, std::span<const std::byte> record) {
        const std::size_t at = counter % capacity_;
        const auto length = static_cast<Length>(record.size());
        std::memcpy(data_ + at, &length, sizeof length);
        if (record.empty()) return;
        const std::size_t start = at + sizeof length;
        const std::size_t first = std::min(record.size(), capacity_ - start);
        std::memcpy(data_ + start, record.data(), first);
        std::memcpy(data_, record.data() + first, record.size() - first);
    }

    void read(std::uint64_t counter, std::span<std::byte> record) const {
        if (record.empty()) return;
        const std::size_t start = counter % capacity_ + sizeof(Length);
        const std::size_t first = std::min(record.size(), capacity_ - start);
        std::memcpy(record.data(), data_ + start, first);
        std::memcpy(record.data() + first, data_, record.size() - first);
    }

    Header* header_;
    std::byte* data_;
    std::size_t capacity_;
};

}  // namespace nodeserve::ring
