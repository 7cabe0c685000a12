// What all kernels are made of: tails, exp, the element types, and the one inner product.

#if !NS_HAS_BF16
INLINE Pairs splat_pair(uint32_t pair) {
    return {splat(float_of(pair << 16)), splat(float_of(pair & 0xffff0000u))};
}
INLINE Vec dot(Vec sum, const Pairs& a, const Pairs& b) {
    return fma(a.odd, b.odd, fma(a.even, b.even, sum));
}
#endif

INLINE Vec load_n(const float* p, int64_t n) {
    if (n >= kLanes) return load(p);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}

INLINE void store_n(float* p, Vec x, int64_t n) {
    if (n >= kLanes) return store(p, x);
    float lanes[kLanes];
    store(lanes, x);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// exp(x) to about 2 ulp for x in [-87, 88], clamped outside; exp(0) is exactly 1.
INLINE Vec exp(Vec x) {
    const Vec magic = splat(12582912.0f);
    x = min(max(x, splat(-87.0f)), splat(88.0f));
    const Vec shifted = fma(x, splat(1.44269504f), magic);
    const Vec n = sub(shifted, magic);
    Vec r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.98756915e-4f);
    p = fma(p, r, splat(1.39819994e-3f));
    p = fma(p, r, splat(8.33345205e-3f));
    p = fma(p, r, splat(4.16657962e-2f));
    p = fma(p, r, splat(1.66666657e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(mul(p, r), r, add(r, splat(1.0f)));
    return scale_by_power(p, shifted);
}

INLINE Vec silu(Vec x) { return div(x, add(splat(1.0f), exp(sub(zero(), x)))); }

// The element types. `Weight` is what weights and KV pages hold, `Act` what activations hold,
// `kDepth` how many steps of the inner dimension one vector
// carries, `Values` that vector's registers. Up to
// `kQuantisedRows` rows a quantised weight is read rather than its panels.
struct Bf16 {
    using Weight = uint16_t;
    using Act = uint16_t;
    using Values = Pairs;
    static constexpr int kDepth = 2;
    static constexpr int kRows = NS_BF16_ROWS;  // of a tile 4 (or 2) vectors wide
    static constexpr int kLinearRows = NS_BF16_LINEAR_ROWS;
    static constexpr int kQuantisedRows = NS_HAS_BF16 ? 4 : 0;
    static INLINE Pairs weights(const Weight* p) { return load_pairs(p); }
    static INLINE Pairs act(const Act* p) {
        uint32_t pair;
        std::memcpy(&pair, p, sizeof pair);
        return splat_pair(pair);
    }
    static INLINE Pairs last_act(const Act* p) { return splat_pair(*p); }
    static INLINE Vec mac(Vec sum, const Pairs& w, const Pairs& a) { return dot(sum, w, a); }
    static INLINE Vec widen(const Weight* p) { return load_bf16(p); }
    static INLINE void narrow(Weight* p, Vec x) { store_bf16(p, x); }
    static INLINE void put(Act* p, Vec x) { store_bf16(p, x); }
};

struct F32 {
    using Weight = float;
    using Act = float;
    using Values = Vec;
    static constexpr int kDepth = 1;
    static constexpr int kRows = NS_F32_ROWS;
    static constexpr int kLinearRows = NS_F32_LINEAR_ROWS;
    static constexpr int kQuantisedRows = NS_SIMD == 512 ? 4 : 0;
    static INLINE Vec weights(const Weight* p) { return load(p); }
    static INLINE Vec act(const Act* p) { return splat(*p); }
    static INLINE Vec last_act(const Act* p) { return splat(*p); }
    static INLINE Vec mac(Vec sum, Vec w, Vec a) { return fma(w, a, sum); }
    static INLINE Vec widen(const Weight* p) { return load(p); }
    static INLINE void narrow(Weight* p, Vec x) { store(p, x); }
    static INLINE void put(Act* p, Vec x) { store(p, x); }
};

struct F16 {
    using Weight = uint16_t;
    using Act = float;
    using Values = Vec;
    static constexpr int kDepth = 1;
    static constexpr int kRows = NS_F32_ROWS;
    static constexpr int kLinearRows = NS_F32_LINEAR_ROWS;
    static constexpr int kQuantisedRows = 0;
    static INLINE Vec weights(const Weight* p) { return load_fp16(p); }
    static INLINE Vec act(const Act* p) { return splat(*p); }
    static INLINE Vec last_act(const Act* p) { return splat(*p); }
    static INLINE Vec mac(Vec sum, Vec w, Vec a) { return fma(w, a, sum); }
    static INLINE Vec widen(const Weight* p) { return load_fp16(p); }
    static INLINE void narrow(Weight* p, Vec x) { store_fp16(p, x); }
    static INLINE void put(Act* p, Vec x) { store(p, x); }
};

// Any number of columns at the end of a row.
template <class T>
INLINE void put_n(typename T::Act* p, Vec x, int64_t n) {
    if (n >= kLanes) return T::put(p, x);
    typename T::Act lanes[kLanes];
    T::put(lanes, x);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

template <class T>
INLINE Vec widen_n(const typename T::Weight* p, int64_t n) {
    if (n >= kLanes) return T::widen(p);
    typename T::Weight lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return T::widen(lanes);
}

// Activations back as floats.
template <class T>
INLINE Vec act_widen(const typename T::Act* p) {
    if constexpr (sizeof(typename T::Act) == sizeof(float)) return load(p);
    else return T::widen(p);
}

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// sums[r][c] += over `steps` of x[r][step] * w[c][step]: the only place where products are summed,
// so that linears, scores and values are the same chain whatever the tile around them.
// fetch(step, columns) gives w[0..C)[step]; it is called once per step, in order.
template <class T, int R, int C, class Fetch>
INLINE void product_of(Vec (&sums)[R][C], const typename T::Act* x, int64_t x_stride, int64_t steps,
                       const Fetch& fetch) {
    for (int64_t step = 0; step < steps; ++step) {
        typename T::Values columns[C];
        fetch(step, columns);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto a = T::act(x + r * x_stride + step * T::kDepth);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = T::mac(sums[r][c], columns[c], a);
        }
    }
}

// The same of weights in memory. `ahead` are P addresses, one line of each prefetched per step.
template <class T, int R, int C, int P>
INLINE void product(Vec (&sums)[R][C], const typename T::Weight* const (&w)[C], int64_t w_stride,
                    const typename T::Act* x, int64_t x_stride, int64_t steps,
                    const char* const* ahead) {
    product_of<T>(sums, x, x_stride, steps,
                  [&](int64_t step, typename T::Values (&columns)[C]) INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c] = T::weights(w[c] + step * w_stride);
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i)
            prefetch(ahead[i] + step * w_stride * static_cast<int64_t>(sizeof(typename T::Weight)));
    });
}
