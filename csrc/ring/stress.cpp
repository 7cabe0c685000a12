// Two threads over one ring, for the sanitizers (sanitize.sh): random sizes, wrap-around, full and
// empty all the time, both sides asleep whenever they may be. Every record is checked whole and in
// order. A lost wake-up is a hang, which the alarm turns into a failure.
#include <semaphore.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "ring/ring.h"

using nodeserve::ring::Header;
using nodeserve::ring::RecordTooLarge;
using nodeserve::ring::Ring;
using nodeserve::ring::RingError;
using Record = std::vector<std::byte>;

namespace {

constexpr unsigned kLimitSeconds = 120;

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "stress: %s\n", what);
    std::abort();
}

class Doorbell {
  public:
    Doorbell() { require(sem_init(&semaphore_, 0, 0) == 0, "sem_init"); }
    ~Doorbell() { sem_destroy(&semaphore_); }
    Doorbell(const Doorbell&) = delete;
    Doorbell& operator=(const Doorbell&) = delete;
    void ring() { sem_post(&semaphore_); }
    void wait() {
        while (sem_wait(&semaphore_) != 0) continue;  // a signal
    }

  private:
    sem_t semaphore_;
};

struct Memory {
    explicit Memory(std::size_t capacity)
        : num_bytes(sizeof(Header) + capacity),
          start(static_cast<std::byte*>(std::aligned_alloc(
              alignof(Header),
              (num_bytes + alignof(Header) - 1) / alignof(Header) * alignof(Header)))) {}
    ~Memory() { std::free(start); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    std::span<std::byte> bytes() const { return {start, num_bytes}; }

    std::size_t num_bytes;
    std::byte* start;
};

// Size and contents follow from the seed and the number alone, so the reader can tell.
Record make_record(std::uint32_t seed, std::uint32_t number, std::size_t max_bytes) {
    std::minstd_rand random(seed * 7919 + number);
    Record record(random() % (max_bytes + 1));
    for (auto& byte : record) byte = static_cast<std::byte>(random());
    return record;
}

struct Pair {
    Ring& ring;
    Doorbell& producer;
    Doorbell& consumer;
};

void wake_consumer(Pair pair) {
    if (pair.ring.consumer_to_wake()) pair.consumer.ring();
}

void put_waiting(Pair pair, const Record& record) {
    while (!pair.ring.put(record)) {
        if (pair.ring.arm_producer(record.size())) pair.producer.wait();
    }
    wake_consumer(pair);
}

// Writes pairs of records published together, and now and then some that are never published, as a
// producer would that is killed before the store of head.
void produce(Pair pair, std::uint32_t seed, std::uint32_t num_records, std::size_t max_bytes) {
    for (std::uint32_t number = 0; number < num_records; ++number) {
        const Record record = make_record(seed, number, max_bytes);
        if (number % 5 == 0) Ring::Batch(pair.ring).add(Record(max_bytes, std::byte{0xEE}));
        Ring::Batch batch(pair.ring);
        if (number % 3 == 0 && number + 1 < num_records && batch.add(record) &&
            batch.add(make_record(seed, number + 1, max_bytes))) {
            batch.publish();
            wake_consumer(pair);
            ++number;
        } else {
            put_waiting(pair, record);
        }
    }
}

void consume(Pair pair, std::uint32_t seed, std::uint32_t num_records, std::size_t max_bytes) {
    std::uint32_t number = 0;
    while (number < num_records) {
        std::vector<Record> records;
        records.reserve(16);
        pair.ring.drain(1 + number % 16, [&](std::size_t record_bytes) {
            return records.emplace_back(record_bytes).data();
        });
        if (pair.ring.producer_to_wake()) pair.producer.ring();
        for (const Record& record : records) {
            require(record == make_record(seed, number++, max_bytes), "a record differs");
        }
        if (records.empty() && pair.ring.arm_consumer()) pair.consumer.wait();
    }
    require(pair.ring.pending_bytes() == 0, "more records than were sent");
}

void run(std::uint32_t seed, std::size_t capacity, std::size_t max_bytes,
         std::uint32_t num_records) {
    const Memory memory(capacity);
    Ring producer_ring = Ring::create(memory.bytes());
    Ring consumer_ring = Ring::open(memory.bytes());
    Doorbell producer, consumer;
    std::thread sends([&] {
        produce({producer_ring, producer, consumer}, seed, num_records, max_bytes);
    });
    consume({consumer_ring, producer, consumer}, seed, num_records, max_bytes);
    sends.join();
}

void idle(std::minstd_rand& random) {
    for (unsigned left = random() % 400; left > 0; --left) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
    }
}

Record take_one(Pair pair, std::minstd_rand& random) {
    Record record;
    const auto place = [&](std::size_t record_bytes) {
        record.resize(record_bytes);
        return record.data();
    };
    while (pair.ring.drain(1, place) == 0) {
        idle(random);
        if (pair.ring.arm_consumer()) pair.consumer.wait();
    }
    return record;
}

// One record to and fro: with nothing behind it, each lost wake-up is a hang. The random delays
// make announcing a sleep and publishing a record meet.
void ping_pong(std::uint32_t seed, std::uint32_t num_records) {
    const Memory memory_there(64), memory_back(64);
    Ring there = Ring::create(memory_there.bytes()), back = Ring::create(memory_back.bytes());
    Doorbell here, yonder;
    std::thread echoes([&] {
        std::minstd_rand random(seed + 1);
        for (std::uint32_t number = 0; number < num_records; ++number) {
            const Record record = take_one({there, here, yonder}, random);
            idle(random);
            put_waiting({back, yonder, here}, record);
        }
    });
    std::minstd_rand random(seed + 2);
    for (std::uint32_t number = 0; number < num_records; ++number) {
        const Record record = make_record(seed, number, 60);
        put_waiting({there, here, yonder}, record);
        require(take_one({back, yonder, here}, random) == record, "an echo differs");
    }
    echoes.join();
}

void wait_for(const std::atomic<std::uint32_t>& round, std::uint32_t value) {
    for (unsigned spins = 0; round.load(std::memory_order_acquire) != value; ++spins) {
        if (spins > 1000) std::this_thread::yield();  // somebody else has the other core
    }
}

// The theorem behind the doorbells, tried in isolation: when one side announces its sleep at the
// moment the other publishes, at least one of them sees the other.
template <typename Announce, typename Publish, typename Reset>
void one_sees_the_other(std::uint32_t num_rounds, Announce announce, Publish publish, Reset reset) {
    std::atomic<std::uint32_t> start{0}, done{0};
    bool sleeps = false;
    std::thread other([&] {
        for (std::uint32_t round = 1; round <= num_rounds; ++round) {
            wait_for(start, round);
            sleeps = announce();
            done.store(round, std::memory_order_release);
        }
    });
    std::minstd_rand random(num_rounds);
    for (std::uint32_t round = 1; round <= num_rounds; ++round) {
        start.store(round, std::memory_order_release);
        idle(random);  // about as long as the other needs to notice
        const bool woken = publish();
        wait_for(done, round);
        require(woken || !sleeps, "both missed the other");
        reset();
    }
    other.join();
}

void litmus(std::uint32_t num_rounds) {
    const Memory memory(64);
    Ring ring = Ring::create(memory.bytes());
    const Record record(60);
    const auto empty = [&] {
        Record out(60);
        ring.drain(1, [&](std::size_t) { return out.data(); });
        return ring.producer_to_wake();
    };
    const auto fill = [&] {
        ring.put(record);
        return ring.consumer_to_wake();
    };
    one_sees_the_other(
        num_rounds, [&] { return ring.arm_consumer(); }, fill,
        [&] {
            empty();
            ring.disarm_consumer();
        });
    fill();
    one_sees_the_other(
        num_rounds, [&] { return ring.arm_producer(60); }, empty,
        [&] {
            fill();
            ring.disarm_producer();
        });
}

template <typename Error, typename Use>
void refuses(Use&& use, const char* what) {
    try {
        use();
    } catch (const Error&) {
        return;
    }
    require(false, what);
}

// Whatever stands in the shared words, no access leaves the memory: the address sanitizer watches.
void damage(std::uint32_t seed) {
    std::minstd_rand random(seed);
    const Memory memory(256);
    Ring ring = Ring::create(memory.bytes());
    refuses<RecordTooLarge>([&] { ring.put(Record(253)); }, "took a record that cannot fit");
    refuses<RingError>([&] { Ring::open(memory.bytes().first(512)); }, "opened half a ring");
    for (int turn = 0; turn < 2000; ++turn) {
        const std::size_t words = memory.num_bytes / sizeof(std::uint32_t);
        const auto value = static_cast<std::uint32_t>(random() % 4 == 0 ? random() : random() % 512);
        std::memcpy(memory.start + random() % words * sizeof value, &value, sizeof value);
        Record record;
        try {
            ring.put(Record(random() % 253));
            ring.arm_producer(random() % 253);
            ring.arm_consumer();
            ring.drain(8, [&](std::size_t record_bytes) {
                record.resize(record_bytes);
                return record.data();
            });
        } catch (const RingError&) {
            ring = Ring::create(memory.bytes());
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const auto num_records =
        static_cast<std::uint32_t>(argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 20000);
    alarm(kLimitSeconds);
    litmus(10 * num_records);
    for (std::uint32_t seed = 0; seed < 4; ++seed) {
        alarm(kLimitSeconds);  // anew: a machine that is busy with others is slow and not stuck
        run(seed, 64, 60, num_records);
        run(seed, 248, 100, num_records);
        run(seed, 4096, 1500, num_records);
        run(seed, 1 << 16, 60, num_records);
        ping_pong(seed, num_records);
        damage(seed);
    }
    std::puts("stress: every record whole and in order");
    return 0;
}
