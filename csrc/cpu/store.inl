// Splits qkv rows, normalises q and k where the model does, rotates them, writes k and v into their
// pages and leaves q for attention.
//
// The first token of a group of 16 clears the group's values: attention multiplies the values of
// tokens that are not there yet by zero, and what a former owner left must not be an infinity.
// So one thread must write a group's tokens of one sequence; the caller deals tokens that way.

INLINE void norm_head(float* x, const float* weight, int width, float eps) {
    const Vec inverse = splat(inverse_rms(x, width, eps));
    for (int i = 0; i < width; i += kLanes)
        store(x + i, mul(mul(load(x + i), inverse), load(weight + i)));
}

// Rotate-half: element i turns with element i + width / 2.
INLINE void rotate_head(float* x, const float* cos, const float* sin, int width) {
    const int half = width / 2;
    for (int i = 0; i < half; i += kLanes) {
        const int left = half - i;
        const Vec a = load_n(x + i, left), b = load_n(x + half + i, left);
        const Vec c = load_n(cos + i, left), s = load_n(sin + i, left);
        store_n(x + i, sub(mul(a, c), mul(b, s)), left);
        store_n(x + half + i, add(mul(b, c), mul(a, s)), left);
    }
}

INLINE void copy_head(float* to, const float* from, int width) {
    for (int i = 0; i < width; i += kLanes) store(to + i, load(from + i));
}

constexpr int kMaxHeadDim = 256;

template <class T>
INLINE void write_key(typename T::Weight* page, const float* key, int width, int slot) {
    typename T::Weight narrow[kMaxHeadDim];
    for (int i = 0; i < width; i += kLanes) T::narrow(narrow + i, load(key + i));
    typename T::Weight* to = page + slot / kGroup * kGroup * width + slot % kGroup * T::kDepth;
    for (int i = 0; i < width; i += T::kDepth, to += kGroup * T::kDepth)
        std::memcpy(to, narrow + i, sizeof(typename T::Weight) * T::kDepth);
}

template <class T>
INLINE void write_value(typename T::Weight* page, const float* value, int width, int slot) {
    using Weight = typename T::Weight;
    Weight narrow[kMaxHeadDim];
    for (int i = 0; i < width; i += kLanes) T::narrow(narrow + i, load(value + i));
    Weight* const group = page + slot / kGroup * kGroup * width;
    if (slot % kGroup == 0) std::memset(group, 0, sizeof(Weight) * kGroup * static_cast<size_t>(width));
    Weight* const to = group + slot % kGroup / T::kDepth * T::kDepth * width + slot % T::kDepth;
    for (int i = 0; i < width; ++i) to[i * T::kDepth] = narrow[i];
}

template <class T>
void store_token(const StoreCall& call, int64_t token) {
    const AttentionParams& p = *call.params;
    const StepView& step = *call.step;
    const int width = p.head_dim, position = step.positions[token];
    const float* const cos = p.cos + static_cast<int64_t>(position) * (width / 2);
    const float* const sin = p.sin + static_cast<int64_t>(position) * (width / 2);
    const float* from = call.qkv + token * (p.num_heads + 2 * p.num_kv_heads) * width;
    float head[kMaxHeadDim];

    auto* query = static_cast<typename T::Act*>(call.query) + token * p.num_heads * width;
    for (int h = 0; h < p.num_heads; ++h, from += width, query += width) {
        copy_head(head, from, width);
        if (p.q_norm) norm_head(head, p.q_norm, width, p.norm_eps);
        rotate_head(head, cos, sin, width);
        for (int i = 0; i < width; i += kLanes) T::put(query + i, load(head + i));
    }
    const int slot = position % step.pages.block_size;
    const int64_t block = step.token_blocks[token];
    for (int h = 0; h < p.num_kv_heads; ++h, from += width) {
        char* const page = k_page(step.pages, block, call.layer, h);
        copy_head(head, from, width);
        if (p.k_norm) norm_head(head, p.k_norm, width, p.norm_eps);
        rotate_head(head, cos, sin, width);
        write_key<T>(reinterpret_cast<typename T::Weight*>(page), head, width, slot);
        write_value<T>(reinterpret_cast<typename T::Weight*>(page + step.pages.page_bytes),
                       from + p.num_kv_heads * width, width, slot);
    }
}

void store(Dtype dtype, const StoreCall& call, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
        if (dtype == Dtype::BF16) store_token<Bf16>(call, token);
        else if (dtype == Dtype::F32) store_token<F32>(call, token);
        else store_token<F16>(call, token);
    }
}
