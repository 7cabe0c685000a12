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
void linear_tile(const LinearParams& p, int64_t row, int64_t column, const void* panel) {
    using Weight = typename T::Weight;
    constexpr int kVectors = kPanel / kLanes;
    constexpr int64_t kStride = kPanel * T::kDepth;
    const int64_t steps = p.k / T::kDepth, tail = p.k % T::kDepth;
    const Weight* w[kVectors];
    for (int c = 0; c < kVectors; ++c)
        w[c] = static_cast<const Weight*>(panel) + c * kLanes * T::kDepth;
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

using LinearTile = void (*)(const LinearParams&, int64_t row, int64_t column, const void* panel);

template <class T, int... R>
LinearTile pick_tile(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr LinearTile tiles[] = {linear_tile<T, R + 1>...};
    return tiles[rows - 1];
}

#if NS_HAS_BF16
// A few rows of Bf16: integers become pairs in registers, on the way from memory to the products.
template <class Source, int R>
void quantised_tile(const LinearParams& p, int64_t row, int64_t column, const void* panel) {
    const uint16_t* const x = static_cast<const uint16_t*>(p.x) + row * p.k;
    Vec sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = zero();
    each_run<Bf16, Source>(
        static_cast<const char*>(panel), p.k, p.zero, [&](Source& source, int64_t start) INLINE_LAMBDA {
            product_of<Bf16>(sums, x + start * 2, p.k, kRun,
                             [&](int64_t step, Pairs (&columns)[2]) INLINE_LAMBDA {
                for (int c = 0; c < 2; ++c)
                    columns[c] = join_pairs(source.next(step, 2 * c), source.next(step, 2 * c + 1));
            });
        });
    finish<Bf16, R, 2>(p, sums, row, column);
}

template <class Source, int... R>
LinearTile pick_quantised_tile(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr LinearTile tiles[] = {quantised_tile<Source, R + 1>...};
    return tiles[rows - 1];
}
#endif

// Rows that stay in the second-level cache while all panels pass: a multiple of the tile's height.
template <class T>
INLINE int64_t rows_of_slab(int64_t k) {
    constexpr int64_t kSlabBytes = 192 << 10, kLeastTiles = 4;
    const int64_t tiles = kSlabBytes / (k * static_cast<int64_t>(sizeof(typename T::Act)) * T::kLinearRows);
    return (tiles > kLeastTiles ? tiles : kLeastTiles) * T::kLinearRows;
}

// `panels` begins with panel `first`.
template <class T>
void linear_of(const LinearParams& p, const typename T::Weight* panels, int64_t first, int64_t last) {
    const int64_t panel_size = (p.k + T::kDepth - 1) / T::kDepth * T::kDepth * kPanel;
    const int64_t most = rows_of_slab<T>(p.k), slabs = (p.rows + most - 1) / most;
    for (int64_t slab = 0; slab < slabs; ++slab) {
        const int64_t start = p.rows * slab / slabs, end = p.rows * (slab + 1) / slabs;
        const int64_t blocks = (end - start + T::kLinearRows - 1) / T::kLinearRows;
        for (int64_t panel = first; panel < last; ++panel)
            for (int64_t block = 0, row = start; block < blocks; ++block) {  // as equal as can be
                const int64_t rows = (end - row + blocks - block - 1) / (blocks - block);
                pick_tile<T>(rows, std::make_integer_sequence<int, T::kLinearRows>{})(
                    p, row, panel * kPanel, panels + (panel - first) * panel_size);
                row += rows;
            }
    }
}

// Many rows: some panels are expanded, then every row passes them.
template <class T, class Source>
void quantised_linear(const LinearParams& p, int64_t first, int64_t last) {
    const int64_t panel_bytes = p.k / kScaled * Source::kBytes, panel_size = p.k * kPanel;
    const char* const weight = static_cast<const char*>(p.weight);
#if NS_HAS_BF16
    if constexpr (T::kDepth == 2)
        if (p.rows <= T::kLinearRows) {
            const auto tile =
                pick_quantised_tile<Source>(p.rows, std::make_integer_sequence<int, T::kLinearRows>{});
            for (int64_t panel = first; panel < last; ++panel)
                tile(p, 0, panel * kPanel, weight + panel * panel_bytes);
            return;
        }
#endif
    auto* const panels = reinterpret_cast<typename T::Weight*>(p.scratch);
    const int64_t most = panels_at_once(panel_size * static_cast<int64_t>(sizeof(typename T::Weight)));
    for (int64_t end; first < last; first = end) {
        end = first + most < last ? first + most : last;
        for (int64_t panel = first; panel < end; ++panel)
            expand<T, Source>(weight + panel * panel_bytes, p.k, p.zero, panels + (panel - first) * panel_size);
        linear_of<T>(p, panels, first, end);
    }
}

template <class T>
void linear_stored(const LinearParams& p, int64_t first, int64_t last) {
    if (p.storage == Storage::Q4) return quantised_linear<T, FourBits<T, HalfScales>>(p, first, last);
    if (p.storage == Storage::Q4_F32) return quantised_linear<T, FourBits<T, FloatScales>>(p, first, last);
    if (p.storage == Storage::Q8) return quantised_linear<T, EightBits<T>>(p, first, last);
    const int64_t panel_size = (p.k + T::kDepth - 1) / T::kDepth * T::kDepth * kPanel;
    linear_of<T>(p, static_cast<const typename T::Weight*>(p.weight) + first * panel_size, first, last);
}

void linear(Dtype dtype, const LinearParams& p, int64_t first, int64_t last) {
    if (dtype == Dtype::BF16) return linear_stored<Bf16>(p, first, last);
    if (dtype == Dtype::F32) return linear_stored<F32>(p, first, last);
    return linear_stored<F16>(p, first, last);
}
