// 16 floats in four 128-bit registers of the compiler's own vector type: any machine.

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
    Float4 q[4];
};

#define EACH(expression)                          \
    Vec out;                                      \
    for (int i = 0; i < 4; ++i) out.q[i] = (expression); \
    return out

INLINE Vec splat(float x) { EACH((Float4{x, x, x, x})); }
INLINE Vec zero() { return splat(0.0f); }
INLINE Vec load(const float* p) {
    Vec out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
INLINE Vec add(Vec a, Vec b) { EACH(a.q[i] + b.q[i]); }
INLINE Vec sub(Vec a, Vec b) { EACH(a.q[i] - b.q[i]); }
INLINE Vec mul(Vec a, Vec b) { EACH(a.q[i] * b.q[i]); }
INLINE Vec div(Vec a, Vec b) { EACH(a.q[i] / b.q[i]); }
INLINE Vec max(Vec a, Vec b) { EACH(a.q[i] > b.q[i] ? a.q[i] : b.q[i]); }
INLINE Vec min(Vec a, Vec b) { EACH(a.q[i] < b.q[i] ? a.q[i] : b.q[i]); }

INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef __ARM_NEON
    EACH((Float4)vfmaq_f32((float32x4_t)c.q[i], (float32x4_t)a.q[i], (float32x4_t)b.q[i]));
#else
    EACH(a.q[i] * b.q[i] + c.q[i]);
#endif
}

INLINE float highest(Vec x) {
    float lanes[16], out;
    store(lanes, x);
    out = lanes[0];
    for (int i = 1; i < 16; ++i) out = lanes[i] > out ? lanes[i] : out;
    return out;
}
INLINE float total(Vec x) {
    const Float4 four = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// x * 2^n, where `magic` is n + 1.5 * 2^23.
INLINE Vec scale_by_power(Vec x, Vec magic) { EACH((Float4)((Int4)x.q[i] + ((Int4)magic.q[i] << 23))); }

INLINE Vec keep_lanes(Vec x, int first, int last, float fill) {
    for (int i = 0; i < 16; ++i)
        if (i < first || i >= last) x.q[i / 4][i % 4] = fill;
    return x;
}

INLINE Vec load_bf16(const uint16_t* p) {
    EACH(((Float4)((Int4){p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]} << 16)));
}
INLINE void store_bf16(uint16_t* p, Vec x) {
    float lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = bf16_from(lanes[i]);
}
INLINE Vec load_fp16(const uint16_t* p) {
    EACH((Float4{fp16_to(p[4 * i]), fp16_to(p[4 * i + 1]), fp16_to(p[4 * i + 2]), fp16_to(p[4 * i + 3])}));
}
INLINE void store_fp16(uint16_t* p, Vec x) {
    float lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = fp16_from(lanes[i]);
}

struct Pairs {
    Vec even, odd;
};
INLINE Pairs load_pairs(const uint16_t* p) {
    Pairs out;
    Int4 raw[4];
    std::memcpy(raw, p, sizeof raw);
    for (int i = 0; i < 4; ++i) {
        out.even.q[i] = (Float4)(raw[i] << 16);
        out.odd.q[i] = (Float4)(raw[i] & static_cast<int32_t>(0xffff0000u));
    }
    return out;
}

#undef EACH
