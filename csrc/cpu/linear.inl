// x[rows, k] * packed weight -> out[rows, n], in tiles of R rows by C vectors of columns.
//
// A panel of 64 columns is streamed once from memory and stays in the second-level cache for the
// remaining blocks of rows; while it is used, the next panel is prefetched in equal shares.

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

template <class T, int R, int C, int P>
void linear_tile(const LinearParams& p, int64_t row, int64_t column, const char* const* ahead) {
    using Weight = typename T::Weight;
    constexpr int64_t kStride = kPanel * T::kDepth;
    const int64_t steps = p.k / T::kDepth, tail = p.k % T::kDepth;
    const int64_t panel_size = (steps + (tail ? 1 : 0)) * kStride;
    const Weight* const base = static_cast<const Weight*>(p.weight) +
                               column / kPanel * panel_size + column % kPanel * T::kDepth;
    const Weight* w[C];
    for (int c = 0; c < C; ++c) w[c] = base + c * kLanes * T::kDepth;
    const typename T::Act* const x = static_cast<const typename T::Act*>(p.x) + row * p.k;

    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = zero();
    product<T, R, C, P>(sums, w, kStride, x, p.k, steps, ahead);
    if (tail)
        for (int c = 0; c < C; ++c) {
            const auto column_pairs = T::weights(w[c] + steps * kStride);
            for (int r = 0; r < R; ++r)
                sums[r][c] = T::mac(sums[r][c], column_pairs, T::last_act(x + r * p.k + p.k - 1));
        }
    finish<T, R, C>(p, sums, row, column);
}

using LinearTile = void (*)(const LinearParams&, int64_t, int64_t, const char* const*);

template <class T, int C, int P, int... R>
LinearTile pick_rows(int rows, std::integer_sequence<int, R...>) {
    static constexpr LinearTile tiles[] = {linear_tile<T, R + 1, C, P>...};
    return tiles[rows - 1];
}

template <class T, int C>
LinearTile pick_tile(int rows, int num_ahead) {
    using Rows = std::make_integer_sequence<int, T::kRows>;
    switch (num_ahead) {
        case 0: return pick_rows<T, C, 0>(rows, Rows{});
        case 1: return pick_rows<T, C, 1>(rows, Rows{});
        case 2: return pick_rows<T, C, 2>(rows, Rows{});
        default: return pick_rows<T, C, 4>(rows, Rows{});
    }
}

// Rows of one tile column, in blocks as equal as they can be.
template <class T, int C>
void linear_column(const LinearParams& p, int64_t column, int64_t panel_bytes) {
    constexpr int64_t kLine = 64;
    const int64_t blocks = (p.rows + T::kRows - 1) / T::kRows;
    const char* const here = static_cast<const char*>(p.weight) + column / kPanel * panel_bytes +
                             column % kPanel * T::kDepth * sizeof(typename T::Weight);
    // One block of rows reads at the speed of memory: stay a fixed distance ahead in the stream.
    // Several blocks: each fetches its share of the lines of the next panel.
    constexpr int kLines = C * kLanes * T::kDepth * int{sizeof(typename T::Weight)} / kLine;
    const int share = blocks == 1 ? kLines : static_cast<int>((kLines + blocks - 1) / blocks);
    const int num_ahead = share > 2 ? 4 : share;
    const char* const target = here + (blocks == 1 ? NS_STREAM_AHEAD : panel_bytes);
    int64_t row = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int rows = static_cast<int>((p.rows - row + blocks - block - 1) / (blocks - block));
        const int first = static_cast<int>(block) * num_ahead;
        const char* ahead[4];
        for (int i = 0; i < 4; ++i) ahead[i] = target + (first + i) * kLine;
        pick_tile<T, C>(rows, first < kLines ? num_ahead : 0)(p, row, column, ahead);
        row += rows;
    }
}

template <class T>
void linear_of(const LinearParams& p, int64_t first, int64_t last) {
    const int64_t panel_bytes = (p.k + T::kDepth - 1) / T::kDepth * kPanel * T::kDepth *
                                static_cast<int64_t>(sizeof(typename T::Weight));
    while (first < last) {
        const bool whole = NS_TILE_VECTORS == 4 && first % 2 == 0 && first + 1 < last;
        if (whole)
            linear_column<T, NS_TILE_VECTORS>(p, first * kHalfPanel, panel_bytes);
        else
            linear_column<T, 2>(p, first * kHalfPanel, panel_bytes);
        first += whole ? 2 : 1;
    }
}

void linear(Dtype dtype, const LinearParams& p, int64_t first, int64_t last) {
    if (dtype == Dtype::BF16) return linear_of<Bf16>(p, first, last);
    if (dtype == Dtype::F32) return linear_of<F32>(p, first, last);
    return linear_of<F16>(p, first, last);
}
