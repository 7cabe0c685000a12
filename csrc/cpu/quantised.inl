// Small integers and their scales become the very values that a panel of the Dtype would hold.
//
// An integer times its scale is exact in float (params.h says which rounding follows), so fusing the
// product with the sum changes no bit.

struct HalfScales {
    static constexpr int kBytes = 2;
    static INLINE Vec columns(const char* p) { return load_fp16(reinterpret_cast<const uint16_t*>(p)); }
};

struct FloatScales {
    static constexpr int kBytes = 4;
    static INLINE Vec columns(const char* p) { return load(reinterpret_cast<const float*>(p)); }
};

constexpr int kRun = 8;  // steps between two refills: nibbles of a word

// One value per column, spread over the vectors of a step: with two values of k per vector, each twice.
template <class T, class Scales>
INLINE void load_columns(Vec (&out)[2 * T::kDepth], const char* p) {
    for (int c = 0; c < 2; ++c) {
        const Vec columns = Scales::columns(p + c * kLanes * Scales::kBytes);
        if constexpr (T::kDepth == 1) {
            out[c] = columns;
        } else {
            out[2 * c] = twice(columns, 0);
            out[2 * c + 1] = twice(columns, 1);
        }
    }
}

// Both kinds: open() each group, refill() each run of it, then next() for each step's vectors.
template <class T, class Scales>
struct FourBits {
    static constexpr int kVectors = 2 * T::kDepth;
    static constexpr int64_t kInts = kPanel * kScaled / 2, kBytes = kInts + 2 * kPanel * Scales::kBytes;
    Nibbles numbers;
    Words words[kVectors];
    Vec scale[kVectors], low[kVectors];

    explicit INLINE FourBits(float zero) : numbers(nibbles_from(zero)) {}
    INLINE void open(const char* group) {
        load_columns<T, Scales>(scale, group + kInts);
        load_columns<T, Scales>(low, group + kInts + kPanel * Scales::kBytes);
    }
    INLINE void refill(const char* group, int run) {
        for (int v = 0; v < kVectors; ++v)
            words[v] = load_words(group + (run * kVectors + v) * kLanes * 4);
    }
    INLINE Vec next(int64_t, int v) { return fma(next_nibbles(numbers, words[v]), scale[v], low[v]); }
};

template <class T>
struct EightBits {
    static constexpr int kVectors = 2 * T::kDepth;
    static constexpr int64_t kInts = kPanel * kScaled, kBytes = kInts + kPanel * HalfScales::kBytes;
    const int8_t* ints;
    Vec scale[kVectors];

    explicit INLINE EightBits(float) {}
    INLINE void open(const char* group) { load_columns<T, HalfScales>(scale, group + kInts); }
    INLINE void refill(const char* group, int run) {
        ints = reinterpret_cast<const int8_t*>(group) + run * kRun * kVectors * kLanes;
    }
    INLINE Vec next(int64_t step, int v) {
        return mul(load_int8(ints + (step * kVectors + v) * kLanes), scale[v]);
    }
};

// Calls body(source, step of the panel) for each run of eight steps.
template <class T, class Source, class Body>
INLINE void each_run(const char* panel, int64_t k, float zero, const Body& body) {
    constexpr int64_t kAhead = 4096;  // in the stream of weights, measured on Zen 4
    constexpr int kRuns = kScaled / T::kDepth / kRun;
    Source source(zero);
    for (int64_t group = 0; group < k / kScaled; ++group, panel += Source::kBytes) {
        for (int64_t line = 0; line < Source::kBytes; line += 64) prefetch(panel + kAhead + line);
        source.open(panel);
        for (int run = 0; run < kRuns; ++run) {
            source.refill(panel, run);
            body(source, (group * kRuns + run) * kRun);
        }
    }
}

// A panel of the Dtype, written to `to`: [k / depth][32][depth].
template <class T, class Source>
void expand(const char* panel, int64_t k, float zero, typename T::Weight* to) {
    each_run<T, Source>(panel, k, zero, [&](Source& source, int64_t) INLINE_LAMBDA {
#pragma GCC unroll 8
        for (int step = 0; step < kRun; ++step, to += kPanel * T::kDepth)
#if NS_HAS_BF16
            if constexpr (T::kDepth == 2) {
                store_pairs(to, join_pairs(source.next(step, 0), source.next(step, 1)));
                store_pairs(to + kPanel, join_pairs(source.next(step, 2), source.next(step, 3)));
            } else
#endif
                for (int v = 0; v < Source::kVectors; ++v) T::narrow(to + v * kLanes, source.next(step, v));
    });
}
