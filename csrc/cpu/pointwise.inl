// RMS norm, the embedding lookup, and reading for its own sake.

// 1 / sqrt(mean(x^2) + eps). One accumulator per lane, then a fixed tree.
INLINE float inverse_rms(const float* x, int64_t width, float eps) {
    Vec sum = zero();
    for (int64_t i = 0; i < width; i += kLanes) {
        const Vec v = load_n(x + i, width - i);
        sum = fma(v, v, sum);
    }
    return 1.0f / std::sqrt(total(sum) / static_cast<float>(width) + eps);
}

template <class T>
void rms_norm_of(const NormParams& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const float* const x = p.x + row * p.width;
        typename T::Act* const out = static_cast<typename T::Act*>(p.out) + row * p.width;
        const Vec inverse = splat(inverse_rms(x, p.width, p.eps));
        for (int64_t i = 0; i < p.width; i += kLanes) {
            const int64_t left = p.width - i;
            put_n<T>(out + i, mul(mul(load_n(x + i, left), inverse), load_n(p.weight + i, left)), left);
        }
    }
}

void rms_norm(Dtype dtype, const NormParams& p, int64_t first, int64_t last) {
    if (dtype == Dtype::BF16) return rms_norm_of<Bf16>(p, first, last);
    return rms_norm_of<F32>(p, first, last);  // activations of F16 are float as well
}

template <class T>
void embed_of(const EmbedParams& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const auto* const source =
            static_cast<const typename T::Weight*>(p.table) + p.token_ids[row] * p.width;
        for (int64_t i = 0; i < p.width; i += kLanes)
            store_n(p.out + row * p.width + i, widen_n<T>(source + i, p.width - i), p.width - i);
    }
}

void embed(Dtype dtype, const EmbedParams& p, int64_t first, int64_t last) {
    if (dtype == Dtype::BF16) return embed_of<Bf16>(p, first, last);
    if (dtype == Dtype::F32) return embed_of<F32>(p, first, last);
    return embed_of<F16>(p, first, last);
}

// Reads every line once, as fast as this instruction set can: the memory ceiling of a benchmark.
float read(const char* bytes, int64_t num_lines) {
    constexpr int64_t kLine = 64, kAhead = 768;
    Vec sums[2] = {zero(), zero()};
    for (int64_t i = 0; i < num_lines; ++i, bytes += kLine) {
        prefetch(bytes + kAhead);
        sums[i % 2] = add(sums[i % 2], load(reinterpret_cast<const float*>(bytes)));
    }
    return total(add(sums[0], sums[1]));
}
