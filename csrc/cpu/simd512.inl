// 16 floats in one 512-bit register.

using Vec = __m512;

INLINE Vec zero() { return _mm512_setzero_ps(); }
INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE float highest(Vec x) { return _mm512_reduce_max_ps(x); }
INLINE float total(Vec x) { return _mm512_reduce_add_ps(x); }

// x * 2^n, where `magic` is n + 1.5 * 2^23.
INLINE Vec scale_by_power(Vec x, Vec magic) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(magic), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n));
}

INLINE Vec keep_lanes(Vec x, int first, int last, float fill) {
    const unsigned below = (1u << last) - 1, skip = (1u << first) - 1;
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(below & ~skip), x);
}

// Eight neighbours, each twice: lanes [8 * half, 8 * half + 8) of x.
INLINE Vec twice(Vec x, int half) {
    const __m512i pair = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(_mm512_add_epi32(pair, _mm512_set1_epi32(8 * half)), x);
}

INLINE Vec load_bf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

INLINE Vec load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

INLINE void store_fp16(uint16_t* p, Vec x) {
    const __m256i raw = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), raw);
}

#if NS_HAS_BF16

INLINE void store_bf16(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

using Pairs = __m512i;  // 16 pairs of bfloat16
INLINE Pairs join_pairs(Vec first, Vec second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
INLINE Pairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
INLINE Pairs splat_pair(uint32_t pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }
INLINE Vec dot(Vec sum, Pairs a, Pairs b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

#else

INLINE void store_bf16(uint16_t* p, Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i safe = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
}

struct Pairs {
    Vec even, odd;
};
INLINE Pairs load_pairs(const uint16_t* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(raw, high))};
}

#endif
