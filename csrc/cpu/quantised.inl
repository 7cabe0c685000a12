// A few rows by a quantised weight: on the way from memory to the products, integers become the very
// values that a panel of the Dtype holds. An integer times its scale is exact in float, so fusing that
// product with the sum of its low end changes no bit.
//
// A Zen 4 core makes 32 bfloat16 values in some five cycles, of which scaling and rounding are three.

struct HalfScales {
    static constexpr int kBytes = 2;
    static INLINE Vec columns(const char* p) { return load_fp16(reinterpret_cast<const uint16_t*>(p)); }
};

struct FloatScales {
    static constexpr int kBytes = 4;
    static INLINE Vec columns(const char* p) { return load(reinterpret_cast<const float*>(p)); }
};

// One number per column for the vectors of a step: with two steps of k in a vector, each twice.
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

constexpr int kRun = 8;  // steps that are written out one by one
constexpr int kWordVector = kLanes * 4;

// Both kinds: open() each group, refill() each run of it, then next<step>() for each vector, in order.
//
// A permutation looks at no more of an index than it needs: it is mask and conversion at once, of bits
// 0 to 3 by words and of bits 16 to 19 by half words. (Those look at bit 20 too.)
template <class T, class Scales>
struct FourBits {
    static constexpr int kVectors = 2 * T::kDepth;
    static constexpr int64_t kInts = kPanel * kScaled / 2, kBytes = kInts + 2 * kPanel * Scales::kBytes;
    const Vec numbers;
    const __m512i upper;  // the upper halves of `numbers`, twice; the lower halves are zero
    __m512i words[kVectors];
    Vec scale[kVectors], low[kVectors];

    static INLINE Vec numbers_from(float zero) {
        return sub(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), splat(zero));
    }
    static INLINE __m512i upper_of(Vec x) {
        const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
        return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(bits));
    }
    explicit INLINE FourBits(float zero) : numbers(numbers_from(zero)), upper(upper_of(numbers)) {}

    INLINE void open(const char* group) {
        load_columns<T, Scales>(scale, group + kInts);
        load_columns<T, Scales>(low, group + kInts + kPanel * Scales::kBytes);
    }
    INLINE void refill(const char* group, int run) {
        for (int v = 0; v < kVectors; ++v)
            words[v] = _mm512_loadu_si512(group + (run * kVectors + v) * kWordVector);
    }
    template <int kStep>
    INLINE Vec next(int v) {
        if constexpr (kStep % 2 == 0) return fma(_mm512_permutexvar_ps(words[v], numbers), scale[v], low[v]);
        const __m512i found = _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, words[v], upper);
        words[v] = _mm512_srli_epi32(words[v], 4);
        return fma(_mm512_castsi512_ps(found), scale[v], low[v]);
    }
};

// A byte in the middle of the float 2^15 makes 2^15 + 128 + q of it, a sum that scales exactly.
template <class T>
struct EightBits {
    static constexpr int kVectors = 2 * T::kDepth;
    static constexpr int64_t kInts = kPanel * kScaled, kBytes = kInts + kPanel * HalfScales::kBytes;
    static constexpr float kOffset = 32768.0f + 128.0f;
    const char* words;
    Vec scale[kVectors], low[kVectors];

    explicit INLINE EightBits(float) {}
    INLINE void open(const char* group) {
        load_columns<T, HalfScales>(scale, group + kInts);
        for (int v = 0; v < kVectors; ++v) low[v] = mul(scale[v], splat(-kOffset));
    }
    INLINE void refill(const char* group, int run) { words = group + 2 * run * kVectors * kWordVector; }
    template <int kStep>
    INLINE Vec next(int v) {
        const __m512i bytes = _mm512_loadu_si512(words + (kStep / 4 * kVectors + v) * kWordVector);
        const __m512i places = _mm512_broadcast_i32x4(_mm_add_epi8(
            _mm_setr_epi32(0, 4 << 8, 8 << 8, 12 << 8), _mm_set1_epi32(kStep % 4 << 8)));
        const __m512i base = _mm512_castps_si512(splat(32768.0f));
        const __m512i found = _mm512_mask_shuffle_epi8(base, 0x2222222222222222u, bytes, places);
        return fma(_mm512_castsi512_ps(found), scale[v], low[v]);
    }
};

template <class T, int kStep, class Source>
INLINE void next_columns(Source& source, typename T::Values (&columns)[2]) {
    for (int c = 0; c < 2; ++c) {
#if NS_HAS_BF16
        if constexpr (T::kDepth == 2) {
            columns[c] = join_pairs(source.template next<kStep>(2 * c), source.template next<kStep>(2 * c + 1));
            continue;
        } else
#endif
            columns[c] = source.template next<kStep>(c);
    }
}

template <class T, class Source, int R, int... kStep>
INLINE void product_of_run(Vec (&sums)[R][2], Source& source, const typename T::Act* x, int64_t x_stride,
                           std::integer_sequence<int, kStep...>) {
    (product_of<T>(sums, x + kStep * T::kDepth, x_stride, 1,
                   [&](int64_t, typename T::Values (&columns)[2])
                       INLINE_LAMBDA { next_columns<T, kStep>(source, columns); }),
     ...);
}

template <class T, class Source, int R>
void quantised_tile(const LinearParams& p, int64_t column, const char* panel) {
    constexpr int64_t kAhead = 4096;  // in the stream of weights, measured on Zen 4
    const auto* x = static_cast<const typename T::Act*>(p.x);
    Vec sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = zero();
    Source source(p.quantised.zero);
    for (int64_t group = 0; group < p.k / kScaled; ++group, panel += Source::kBytes) {
        for (int64_t line = 0; line < Source::kBytes; line += kCacheLine) prefetch(panel + kAhead + line);
        source.open(panel);
        for (int run = 0; run < kScaled / T::kDepth / kRun; ++run, x += kRun * T::kDepth) {
            source.refill(panel, run);
            product_of_run<T>(sums, source, x, p.k, std::make_integer_sequence<int, kRun>{});
        }
    }
    finish<T, R, 2>(p, sums, 0, column);
}

template <class T, class Source, int... R>
void quantised_panels(const LinearParams& p, int64_t first, int64_t last, std::integer_sequence<int, R...>) {
    using Tile = void (*)(const LinearParams&, int64_t, const char*);
    static constexpr Tile tiles[] = {quantised_tile<T, Source, R + 1>...};
    const int64_t panel_bytes = p.k / kScaled * Source::kBytes;
    for (int64_t panel = first; panel < last; ++panel)
        tiles[p.rows - 1](p, panel * kPanel, p.quantised.groups + panel * panel_bytes);
}

template <class T>
void quantised_linear(const LinearParams& p, int64_t first, int64_t last) {
    const auto rows = std::make_integer_sequence<int, T::kQuantisedRows>{};
    if (p.quantised.storage == Storage::Q4)
        quantised_panels<T, FourBits<T, HalfScales>>(p, first, last, rows);
    else if (p.quantised.storage == Storage::Q4_F32)
        quantised_panels<T, FourBits<T, FloatScales>>(p, first, last, rows);
    else
        quantised_panels<T, EightBits<T>>(p, first, last, rows);
}
