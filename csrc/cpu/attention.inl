// Paged attention: decode and chunked prefill are one path.
//
// A unit is a few query tokens of one sequence; with the heads of one kv head they are its rows.
// Tokens are taken in chunks of 512 at absolute positions: scores, running maximum, weights in the
// activation type, values. What a row does not see has weight exactly 0 and a chunk that it does
// not see rescales by exactly 1, so the bits of a row depend on its own position alone.

template <class T>
struct Item {
    using Weight = typename T::Weight;
    const StepView* step;
    const int32_t* table;  // blocks of the sequence
    int layer, kv_head;

    INLINE const Weight* keys(int64_t group) const {
        const Pages& pages = step->pages;
        const int64_t token = group * kGroup;
        const char* const page = k_page(pages, table[token / pages.block_size], layer, kv_head);
        return reinterpret_cast<const Weight*>(page) + token % pages.block_size * pages.head_dim;
    }
    INLINE const Weight* values(int64_t group) const {
        return keys(group) + step->pages.page_bytes / static_cast<int64_t>(sizeof(Weight));
    }
};

template <class T>
struct Tile {
    using Weight = typename T::Weight;
    using Act = typename T::Act;
    Item<T> item, next;  // `next` is only prefetched,
    int64_t next_group;  // from this group on
    const AttentionParams* params;
    int rows, group_size;       // rows are (token, head), heads fastest
    int64_t position;           // of the first token
    Act* query;                 // [rows, head_dim]
    float* scores;              // [rows, kChunk]
    Act* weights;               // [rows, kChunk]
    float* sums;                // [rows, head_dim]
    float *highest, *totals, *rescale;  // [rows]

    INLINE int64_t end_of(int row) const { return position + row / group_size + 1; }
    INLINE int64_t start_of(int row) const {
        const int64_t start = end_of(row) - params->window;
        return start > 0 ? start : 0;
    }
};

struct Span {  // of groups, and the chunk they are in
    int64_t first, last, chunk;
};

constexpr int kFarGroups = 4;  // groups between a page's prefetch and its use

// The pages in the order in which they are read: keys, values, the next item's keys.
template <class T>
INLINE const char* key_ahead(const Tile<T>& t, const Span& s, int64_t group) {
    if (group < s.last) return reinterpret_cast<const char*>(t.item.keys(group));
    const int64_t value = s.first + group - s.last;
    return reinterpret_cast<const char*>(t.item.values(value < s.last ? value : s.first));
}

template <class T>
INLINE const char* value_ahead(const Tile<T>& t, const Span& s, int64_t group) {
    if (group < s.last) return reinterpret_cast<const char*>(t.item.values(group));
    return reinterpret_cast<const char*>(t.next.keys(t.next_group + group - s.last));
}

template <class T, int R, int C, int P>
INLINE void score_groups(const Tile<T>& t, const Span& s, int row, int64_t group) {
    const int width = t.params->head_dim;
    const typename T::Weight* w[C];
    const char* ahead[C];
    for (int c = 0; c < C; ++c) {
        w[c] = t.item.keys(group + c);
        ahead[c] = P ? key_ahead(t, s, group + kFarGroups + c) : nullptr;
    }
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = zero();
    product<T, R, C, P ? C : 0>(sums, w, kGroup * T::kDepth, t.query + row * width, width,
                                width / T::kDepth, ahead);
    float* const out = t.scores + row * kChunk + group * kGroup - s.chunk;
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * kChunk + c * kLanes, sums[r][c]);
}

template <class T, int R, int P>
void score_rows(const Tile<T>& t, const Span& s, int row, int64_t group, int64_t last) {
    for (; NS_TILE_VECTORS == 4 && group + 4 <= last; group += 4)
        score_groups<T, R, NS_TILE_VECTORS, P>(t, s, row, group);
    for (; group + 2 <= last; group += 2) score_groups<T, R, 2, P>(t, s, row, group);
    if (group < last) score_groups<T, R, 1, P>(t, s, row, group);
}

template <class T, int R, int C, int P>
INLINE void value_columns(const Tile<T>& t, const Span& s, int row, int64_t last, int column) {
    const int width = t.params->head_dim;
    float* const out = t.sums + row * width + column;
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            sums[r][c] = mul(load(out + r * width + c * kLanes), splat(t.rescale[row + r]));
    for (int64_t group = s.first; group < last; ++group) {
        const typename T::Weight* const base = t.item.values(group) + column * T::kDepth;
        const char* const far = P ? value_ahead(t, s, group + kFarGroups) : nullptr;
        const typename T::Weight* w[C];
        const char* ahead[C];
        for (int c = 0; c < C; ++c) {
            w[c] = base + c * kLanes * T::kDepth;
            ahead[c] = far + (column + c * kLanes) * T::kDepth * sizeof(typename T::Weight);
        }
        product<T, R, C, P ? C : 0>(sums, w, width * T::kDepth,
                                    t.weights + row * kChunk + group * kGroup - s.chunk, kChunk,
                                    kGroup / T::kDepth, ahead);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * width + c * kLanes, sums[r][c]);
}

template <class T, int R, int P>
void value_rows(const Tile<T>& t, const Span& s, int row, int64_t last) {
    const int width = t.params->head_dim;
    int column = 0;
    for (; NS_TILE_VECTORS == 4 && column + 4 * kLanes <= width; column += 4 * kLanes)
        value_columns<T, R, NS_TILE_VECTORS, P>(t, s, row, last, column);
    for (; column + 2 * kLanes <= width; column += 2 * kLanes)
        value_columns<T, R, 2, P>(t, s, row, last, column);
    if (column < width) value_columns<T, R, 1, P>(t, s, row, last, column);
}

// One row's weights of one chunk: exp((score - highest) * scale), 0 where it does not see.
template <class T>
void weigh_row(const Tile<T>& t, const Span& s, int row) {
    const int64_t from = t.start_of(row), to = t.end_of(row);
    const int64_t first = s.first > from / kGroup ? s.first : from / kGroup;
    const int64_t seen = (to + kGroup - 1) / kGroup, last = seen < s.last ? seen : s.last;
    float* const scores = t.scores + row * kChunk - s.chunk;
    typename T::Act* const weights = t.weights + row * kChunk - s.chunk;
    for (int64_t g = s.first; g < s.last; ++g)
        if (g < first || g >= last) T::put(weights + g * kGroup, zero());
    t.rescale[row] = 1.0f;
    if (first >= last) return;

    const auto clip = [&](Vec x, int64_t group, float fill) INLINE_LAMBDA {
        const int64_t start = group * kGroup;
        if (start >= from && start + kGroup <= to) return x;
        const int64_t a = from - start, b = to - start;
        return keep_lanes(x, static_cast<int>(a > 0 ? a : 0),
                          static_cast<int>(b < kGroup ? b : kGroup), fill);
    };
    Vec top = splat(-INFINITY);
    for (int64_t g = first; g < last; ++g) top = max(clip(load(scores + g * kGroup), g, -INFINITY), top);
    const float old = t.highest[row], now = highest(top) > old ? highest(top) : old;
    const Vec scale = splat(t.params->scale), peak = splat(now);
    Vec sum = zero();
    for (int64_t g = first; g < last; ++g) {
        const Vec x = exp(mul(sub(load(scores + g * kGroup), peak), scale));
        T::put(weights + g * kGroup, clip(x, g, 0.0f));
        sum = add(sum, act_widen<T>(weights + g * kGroup));
    }
    if (now != old) {
        float lanes[kLanes];
        store(lanes, exp(mul(sub(splat(old), peak), scale)));
        t.rescale[row] = old == -INFINITY ? 0.0f : lanes[0];
    }
    t.highest[row] = now;
    t.totals[row] = t.totals[row] * t.rescale[row] + total(sum);
}

template <class T>
using ScoreRows = void (*)(const Tile<T>&, const Span&, int, int64_t, int64_t);
template <class T>
using ValueRows = void (*)(const Tile<T>&, const Span&, int, int64_t);

template <class T, int P, int... R>
ScoreRows<T> pick_scores(int rows, std::integer_sequence<int, R...>) {
    static constexpr ScoreRows<T> picks[] = {score_rows<T, R + 1, P>...};
    return picks[rows - 1];
}
template <class T, int P, int... R>
ValueRows<T> pick_values(int rows, std::integer_sequence<int, R...>) {
    static constexpr ValueRows<T> picks[] = {value_rows<T, R + 1, P>...};
    return picks[rows - 1];
}

template <class T>
void attend_chunk(const Tile<T>& t, const Span& s) {
    using Rows = std::make_integer_sequence<int, T::kRows>;
    const int blocks = (t.rows + T::kRows - 1) / T::kRows;
    const auto each_block = [&](auto&& body) {
        for (int block = 0, row = 0; block < blocks; ++block) {
            const int rows = (t.rows - row + blocks - block - 1) / (blocks - block);
            const int64_t seen = (t.end_of(row + rows - 1) + kGroup - 1) / kGroup;
            body(row, rows, seen < s.last ? seen : s.last, block == 0);
            row += rows;
        }
    };
    constexpr int64_t kKeysAtOnce = 16;  // groups that stay in the first-level cache for all rows
    for (int64_t group = s.first; group < s.last; group += kKeysAtOnce)
        each_block([&](int row, int rows, int64_t last, bool first_block) {
            const int64_t end = group + kKeysAtOnce < last ? group + kKeysAtOnce : last;
            const auto pick = first_block ? pick_scores<T, 1>(rows, Rows{}) : pick_scores<T, 0>(rows, Rows{});
            if (group < end) pick(t, s, row, group, end);
        });
    for (int row = 0; row < t.rows; ++row) weigh_row(t, s, row);
    each_block([&](int row, int rows, int64_t last, bool first_block) {
        const auto pick = first_block ? pick_values<T, 1>(rows, Rows{}) : pick_values<T, 0>(rows, Rows{});
        pick(t, s, row, last);
    });
}

template <class T>
INLINE char* carve(char*& at, size_t num_bytes) {
    char* const here = at;
    at += (num_bytes + 63) / 64 * 64;
    return here;
}

template <class T>
Tile<T> open_tile(const AttendCall& call, int64_t item_index) {
    const AttentionParams& p = *call.params;
    const StepView& step = *call.step;
    const auto item_at = [&](int64_t index) {
        const Unit& unit = step.units[index / p.num_kv_heads];
        return Item<T>{&step, step.block_table + static_cast<int64_t>(unit.seq) * step.max_blocks,
                       call.layer, static_cast<int>(index % p.num_kv_heads)};
    };
    const Unit& unit = step.units[item_index / p.num_kv_heads];
    const int64_t num_items = static_cast<int64_t>(step.num_units) * p.num_kv_heads;
    Tile<T> t;
    t.item = item_at(item_index);
    t.next = item_at(item_index + 1 < num_items ? item_index + 1 : item_index);
    t.next_group = 0;
    t.params = &p;
    t.group_size = p.num_heads / p.num_kv_heads;
    t.rows = unit.num_tokens * t.group_size;
    t.position = step.positions[unit.first_token];
    const size_t rows = static_cast<size_t>(t.rows), width = static_cast<size_t>(p.head_dim);
    char* at = call.scratch;
    t.scores = reinterpret_cast<float*>(carve<T>(at, rows * kChunk * sizeof(float)));
    t.weights = reinterpret_cast<typename T::Act*>(carve<T>(at, rows * kChunk * sizeof(typename T::Act)));
    t.sums = reinterpret_cast<float*>(carve<T>(at, rows * width * sizeof(float)));
    t.query = reinterpret_cast<typename T::Act*>(carve<T>(at, rows * width * sizeof(typename T::Act)));
    t.highest = reinterpret_cast<float*>(carve<T>(at, rows * sizeof(float)));
    t.totals = reinterpret_cast<float*>(carve<T>(at, rows * sizeof(float)));
    t.rescale = reinterpret_cast<float*>(carve<T>(at, rows * sizeof(float)));
    return t;
}

// Where row `row` of a tile stands in [num_tokens, num_heads * head_dim].
template <class T>
INLINE int64_t offset_of(const Tile<T>& t, int64_t first_token, int row) {
    const int64_t token = first_token + row / t.group_size;
    const int64_t head = static_cast<int64_t>(t.item.kv_head) * t.group_size + row % t.group_size;
    return (token * t.params->num_heads + head) * t.params->head_dim;
}

template <class T>
void attend_item(const AttendCall& call, int64_t index) {
    using Act = typename T::Act;
    const int width = call.params->head_dim;
    const int64_t first_token = call.step->units[index / call.params->num_kv_heads].first_token;
    const Tile<T> t = open_tile<T>(call, index);
    for (int row = 0; row < t.rows; ++row) {
        std::memcpy(t.query + row * width,
                    static_cast<const Act*>(call.query) + offset_of(t, first_token, row),
                    sizeof(Act) * static_cast<size_t>(width));
        t.highest[row] = -INFINITY;
        t.totals[row] = 0.0f;
    }
    std::memset(t.sums, 0, sizeof(float) * static_cast<size_t>(t.rows * width));
    const int64_t end = t.end_of(t.rows - 1), start = t.start_of(0);
    for (int64_t chunk = start / kChunk * kChunk; chunk < end; chunk += kChunk) {
        const int64_t from = start > chunk ? start : chunk;
        const int64_t to = chunk + kChunk < end ? chunk + kChunk : end;
        attend_chunk(t, Span{from / kGroup, (to + kGroup - 1) / kGroup, chunk});
    }
    for (int row = 0; row < t.rows; ++row) {
        const Vec inverse = splat(1.0f / t.totals[row]);
        Act* const out = static_cast<Act*>(call.out) + offset_of(t, first_token, row);
        for (int i = 0; i < width; i += kLanes)
            T::put(out + i, mul(load(t.sums + row * width + i), inverse));
    }
}

void attend(Dtype dtype, const AttendCall& call, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
        if (dtype == Dtype::BF16) attend_item<Bf16>(call, index);
        else if (dtype == Dtype::F32) attend_item<F32>(call, index);
        else attend_item<F16>(call, index);
    }
}
