// x[rows, k] * packed weight -> out[rows, n], in tiles of R rows by C vectors of columns.
//
// A panel of 32 columns is read from memory by its first block of rows and stays in the second-level
// cache for the others. Tall tiles (12 rows by 2 vectors) need few bytes of weights per product, so
// that memory keeps up while it computes.

template <class T, int R, int C>
INLINE void finish(const LinearParams& p, Vec (&sums)[R][C], int64_t row, int64_t column) {
    using Act = typename T::Act;
    if (p.bias)
        for (int c = 0; c < C; ++c) {
            const int64_t start = column + c * kLanes;
            if (start >= p.n) break;
            const Vec bias = load_n(p.bias + start, p.n - start);
            for (int r = 0; r < R; ++r) sums[r][c] = add(sums[r][c], bias);
        }
    if (p.epilogue == Epilogue::SILU_MUL) {  // vectors alternate: 16 of gate, 16 of up
        const int64_t width = p.n / 2;
        for (int r = 0; r < R; ++r)
            for (int c = 0; c + 1 < C; c += 2) {
                const int64_t start = (column + c * kLanes) / 2;
                if (start >= width) break;
                put_n<T>(static_cast<Act*>(p.out) + (row + r) * width + start,
                         mul(silu(sums[r][c]), sums[r][c + 1]), width - start);
            }
        return;
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            const int64_t start = column + c * kLanes, left = p.n - start;
            if (left <= 0) break;
            const int64_t at = (row + r) * p.n + start;
            float* const out = static_cast<float*>(p.out) + at;
            if (p.epilogue == Epilogue::STORE)
                put_n<T>(static_cast<Act*>(p.out) + at, sums[r][c], left);
            else if (p.epilogue == Epilogue::STORE_F32)
                store_n(out, sums[r][c], left);
            else
                store_n(out, add(load_n(out, left), sums[r][c]), left);
        }
}

// Prefetch distances in the stream of weights, measured on Zen 4. A few rows wait for memory, where
// a short distance that helps the machine's own prefetcher is best (38 against 30 GB/s); many rows
// compute, and need each line to be there in time (M = 16: 218 against 187 GFLOP/s).
constexpr int kCacheLine = 64, kNear = 1536, kFar = 8192;

template <class T, int R>
void linear_tile(const LinearParams& p, int64_t row, int64_t column, int64_t panel_size) {
    using Weight = typename T::Weight;
    constexpr int kVectors = kPanel / kLanes;
    constexpr int64_t kStride = kPanel * T::kDepth;
    const int64_t steps = p.k / T::kDepth, tail = p.k % T::kDepth;
    const Weight* w[kVectors];
    for (int c = 0; c < kVectors; ++c)
        w[c] = static_cast<const Weight*>(p.weight) + column / kPanel * panel_size + c * kLanes * T::kDepth;
    const typename T::Act* const x = static_cast<const typename T::Act*>(p.x) + row * p.k;

    Vec sums[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kVectors; ++c) sums[r][c] = zero();
    const char* const from = reinterpret_cast<const char*>(w[0]) + (R <= 4 ? kNear : kFar);
    const char* const ahead[2] = {from, from + kCacheLine};
    product<T, R, kVectors, 2>(sums, w, kStride, x, p.k, steps, ahead);
    if (tail)
        for (int c = 0; c < kVectors; ++c) {
            const auto last = T::weights(w[c] + steps * kStride);
            for (int r = 0; r < R; ++r)
                sums[r][c] = T::mac(sums[r][c], last, T::last_act(x + r * p.k + p.k - 1));
        }
    finish<T, R, kVectors>(p, sums, row, column);
}

using LinearTile = void (*)(const LinearParams&, int64_t, int64_t, int64_t);

template <class T, int... R>
LinearTile pick_tile(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr LinearTile tiles[] = {linear_tile<T, R + 1>...};
    return tiles[rows - 1];
}

// Rows that stay in the second-level cache while all panels pass: a multiple of the tile's height.
template <class T>
INLINE int64_t rows_of_slab(int64_t k) {
    constexpr int64_t kSlabBytes = 192 << 10, kLeastTiles = 4;
    const int64_t tiles = kSlabBytes / (k * static_cast<int64_t>(sizeof(typename T::Act)) * T::kLinearRows);
    return (tiles > kLeastTiles ? tiles : kLeastTiles) * T::kLinearRows;
}

#if NS_SIMD == 512
#include "cpu/quantised.inl"
#endif

template <class T>
void linear_of(const LinearParams& p, int64_t first, int64_t last) {
#if NS_SIMD == 512
    if constexpr (T::kQuantisedRows > 0)
        if (p.quantised.groups && p.rows <= T::kQuantisedRows) return quantised_linear<T>(p, first, last);
#endif
    const int64_t panel_size = (p.k + T::kDepth - 1) / T::kDepth * T::kDepth * kPanel;
    const int64_t most = rows_of_slab<T>(p.k), slabs = (p.rows + most - 1) / most;
    for (int64_t slab = 0; slab < slabs; ++slab) {
        const int64_t start = p.rows * slab / slabs, end = p.rows * (slab + 1) / slabs;
        const int64_t blocks = (end - start + T::kLinearRows - 1) / T::kLinearRows;
        for (int64_t panel = first; panel < last; ++panel)
            for (int64_t block = 0, row = start; block < blocks; ++block) {  // as equal as can be
                const int64_t rows = (end - row + blocks - block - 1) / (blocks - block);
                pick_tile<T>(rows, std::make_integer_sequence<int, T::kLinearRows>{})(
                    p, row, panel * kPanel, panel_size);
                row += rows;
            }
    }
}

void linear(Dtype dtype, const LinearParams& p, int64_t first, int64_t last) {
    if (dtype == Dtype::BF16) return linear_of<Bf16>(p, first, last);
    if (dtype == Dtype::F32) return linear_of<F32>(p, first, last);
    return linear_of<F16>(p, first, last);
}

int64_t quantised_rows(Dtype dtype) {
    if (dtype == Dtype::BF16) return Bf16::kQuantisedRows;
    return dtype == Dtype::F32 ? F32::kQuantisedRows : F16::kQuantisedRows;
}
