// The ring over memory that somebody else writes: whatever stands there, a call ends, stays within
// the memory and gives a result or a RingError. The sanitizers watch; fuzz.sh builds it.
//
// An input is a program of small steps (below): puts, drains, announcements, and damage to any word
// of the segment in between. libFuzzer finds programs by coverage. Without it, FUZZ_ALONE makes a
// program that runs random ones, and also one in which another thread writes over the segment all
// the time: what a check saw may be gone when it is used.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "ring/ring.h"

using nodeserve::ring::Header;
using nodeserve::ring::Ring;
using nodeserve::ring::RingError;

namespace {

constexpr std::size_t kMaxCapacity = 1024;
constexpr std::size_t kMaxRecords = 64;  // more cannot be in it: 8 bytes each is the least

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

// Exactly as large as it says, so that the address sanitizer sees the first byte beside it.
class Segment {
  public:
    explicit Segment(std::size_t capacity)
        : num_bytes_(sizeof(Header) + capacity),
          start_(static_cast<std::byte*>(::operator new(num_bytes_, std::align_val_t{alignof(Header)}))) {
        std::memset(start_, 0, num_bytes_);
    }
    ~Segment() { ::operator delete(start_, std::align_val_t{alignof(Header)}); }
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    std::span<std::byte> bytes() const { return {start_, num_bytes_}; }

    void overwrite(std::size_t place, std::uint64_t value, std::size_t size) {
        place %= num_bytes_ - size + 1;
        std::memcpy(start_ + place, &value, size);
    }

  private:
    std::size_t num_bytes_;
    std::byte* start_;
};

class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

    bool empty() const { return left_ == 0; }

    // Little-endian; zeros behind the end.
    std::uint64_t take(std::size_t size) {
        std::uint64_t value = 0;
        const std::size_t there = std::min(size, left_);
        std::memcpy(&value, data_, there);
        data_ += there;
        left_ -= there;
        return value;
    }

  private:
    const std::uint8_t* data_;
    std::size_t left_;
};

void drain(Ring& ring, std::size_t max_records) {
    std::vector<std::vector<std::byte>> records;
    std::size_t total = 0;
    const std::size_t num = ring.drain(max_records, [&](std::size_t record_bytes) {
        total += record_bytes;
        require(total <= ring.capacity(), "took out more than the ring holds");
        records.emplace_back(record_bytes + 1);  // +1: data() of none is null
        return records.back().data();
    });
    require(num == records.size() && num <= max_records, "the number of records is wrong");
}

void put_some(Ring& ring, std::size_t record_bytes, std::size_t num_records, bool publish) {
    const std::vector<std::byte> record(record_bytes, std::byte{0xab});
    Ring::Batch batch(ring);
    for (std::size_t i = 0; i < num_records && batch.add(record); ++i) continue;
    if (publish) batch.publish();
}

void step(Ring& ring, Segment& segment, Input& input) {
    const auto bytes = [&] { return static_cast<std::size_t>(input.take(2)) % (2 * kMaxCapacity); };
    switch (input.take(1) % 12) {
    case 0: ring.put(std::vector<std::byte>(bytes(), std::byte{0xcd})); break;
    case 1: drain(ring, kMaxRecords * 2); break;
    case 2: drain(ring, input.take(1) % 4); break;
    case 3: put_some(ring, bytes(), input.take(1) % 8, true); break;
    case 4: put_some(ring, bytes(), input.take(1) % 8, false); break;
    case 5: ring.arm_producer(bytes()); break;
    case 6: ring.arm_consumer(); break;
    case 7: require(ring.pending_bytes() <= ring.capacity(), "more is pending than fits"); break;
    case 8:
        ring.consumer_to_wake();
        ring.producer_to_wake();
        ring.disarm_consumer();
        ring.disarm_producer();
        ring.beat();
        ring.beats();
        break;
    case 9: segment.overwrite(input.take(2), input.take(8), 8); break;
    case 10: segment.overwrite(input.take(2), input.take(4), 4); break;
    case 11: ring = Ring::open(segment.bytes()); break;
    }
}

void run(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    Segment segment(input.take(2) % kMaxCapacity);
    const bool fresh = input.take(1) % 2 == 0;
    if (!fresh) {
        for (std::size_t place = 0; place < sizeof(Header); place += 8) {
            segment.overwrite(place, input.take(8), 8);
        }
    }
    try {
        Ring ring = fresh ? Ring::create(segment.bytes()) : Ring::open(segment.bytes());
        while (!input.empty()) {
            try {
                step(ring, segment, input);
            } catch (const RingError&) {  // and whoever does not stop there is safe too
            }
        }
    } catch (const RingError&) {
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    run(data, size);
    return 0;
}

#ifdef FUZZ_ALONE
#include <atomic>
#include <chrono>
#include <random>
#include <string>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;

// Small numbers and neighbours of the capacity: what gets past the first check.
std::uint64_t interesting(std::mt19937_64& random) {
    switch (random() % 4) {
    case 0: return random();
    case 1: return random() % 64 * 8;
    case 2: return 0 - random() % 64 * 8;
    default: return random() % kMaxCapacity;
    }
}

std::uint64_t alone(double seconds, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    std::uint64_t num_runs = 0;
    std::vector<std::uint8_t> program;
    for (; Clock::now() < end; ++num_runs) {
        program.resize(8 * (1 + random() % 64));
        for (std::size_t i = 0; i < program.size(); i += 8) {
            const std::uint64_t word = interesting(random);
            std::memcpy(program.data() + i, &word, 8);
            if (random() % 2 == 0) program[i] = static_cast<std::uint8_t>(random() % 12);
        }
        run(program.data(), program.size());
    }
    return num_runs;
}

// Writes over the counters and lengths with the peer's own instructions while the ring is in use.
[[gnu::no_sanitize("thread")]] void scribble(std::span<std::byte> memory, const std::atomic<bool>& stop) {
    std::mt19937_64 random(7);
    while (!stop.load(std::memory_order_relaxed)) {
        const std::size_t words = memory.size() / sizeof(std::uint32_t);
        auto* word = reinterpret_cast<std::uint32_t*>(memory.data()) + random() % words;
        __atomic_store_n(word, static_cast<std::uint32_t>(interesting(random)), __ATOMIC_RELAXED);
    }
}

std::uint64_t beside_a_scribbler(double seconds) {
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    Segment segment(256);
    Ring ring = Ring::create(segment.bytes());
    std::atomic<bool> stop{false};
    std::thread other([&] { scribble(segment.bytes(), stop); });
    std::mt19937_64 random(8);
    std::uint64_t num_steps = 0;
    for (; Clock::now() < end; ++num_steps) {
        const std::uint64_t word = random();
        Input input(reinterpret_cast<const std::uint8_t*>(&word), sizeof word);
        try {
            step(ring, segment, input);
        } catch (const RingError&) {
        }
    }
    stop = true;
    other.join();
    return num_steps;
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::strtod(argv[1], nullptr) : 5.0;
    const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const auto runs = alone(seconds / 2, seed);
    const auto steps = beside_a_scribbler(seconds / 2);
    std::printf("executions: %llu\n", static_cast<unsigned long long>(runs + steps));
    return 0;
}
#endif
