// What the CPU kernels are told: plain structs of addresses and sizes, no tensor type, no Python.
//
// Always true of every kernel: the arithmetic that makes one output element is one chain in a fixed
// order (over the inner dimension, first to last). How many rows share a step, where a prompt was
// cut, and how many threads ran it decide only who computes an element, never its bits.
#pragma once

#include <cstddef>
#include <cstdint>

// A sanitizer takes minutes over the wide kernels; they share their source with the generic ones.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define NS_X86_LEVELS 1
#else
#define NS_X86_LEVELS 0
#endif

namespace nodeserve::cpu {

// Weights and KV pages are of this type. Activations are bfloat16 for BF16, else float.
enum class Dtype : int { BF16 = 0, F32 = 1, F16 = 2 };

enum class Epilogue : int {
    STORE = 0,      // out[rows, n] in the activation type
    STORE_F32 = 1,  // out[rows, n] in float
    ADD_F32 = 2,    // out[rows, n] float, added to
    SILU_MUL = 3,   // out[rows, n / 2] = silu(gate) * up, in the activation type
};

constexpr int kLanes = 16;       // every kernel speaks of vectors of 16 floats
constexpr int kGroup = kLanes;   // tokens whose keys share a vector
constexpr int kPanel = 32;       // columns of a packed panel, the unit dealt to threads
constexpr int kChunk = 512;      // tokens between two rescalings of the softmax

// A weight once more, for few rows: integers and scales are a third of its bytes, and few rows wait for
// memory. With many the arithmetic of making floats of them again would cost more than it saves.
enum class Storage : int {
    NONE = 0,
    Q4 = 1,      // 4 bits, float16 scales
    Q4_F32 = 2,  // 4 bits, float scales
    Q8 = 3,      // 8 bits, float16 scales
};

constexpr int kScaled = 32;  // values along k that share a scale

// weight = round to Dtype of float((q - zero) * scale) + low, each of the two rounded to float; the
// first is exact. Per panel and 32 of k there is one group: integers, then scale[32] and for 4 bits
// low[32], one per column. A step's 32 * depth integers, in the order of the panel, are vectors of 16
// lanes; 8 steps of 4 bits share words [octet][vector][lane], where step 2 * j + half has the bits from
// 16 * half + 4 * j; 4 steps of 8 bits share words [quad][vector][lane], a byte (q + 128) each.
struct QuantisedWeight {
    const char* groups;  // [ceil(n / 32)][k / 32][group_bytes()], null with NONE
    Storage storage;
    float zero;  // 4 bits: the integer that stands for 0
};

struct LinearParams {
    const void* weight;  // packed: [ceil(n / 32)][ceil(k / depth)][32][depth]; depth 2 for BF16, else 1
    const float* bias;   // [n] or null
    const void* x;       // [rows, k] activation type
    void* out;           // see Epilogue
    int64_t rows, n, k;
    Epilogue epilogue;
    QuantisedWeight quantised;  // the same numbers, to the bit
};

struct NormParams {
    const float* x;       // [rows, width]
    const float* weight;  // [width]
    void* out;            // [rows, width] activation type
    int64_t width;
    float eps;
};

struct EmbedParams {
    const void* table;         // [vocab, width]
    const int32_t* token_ids;  // [rows]
    float* out;                // [rows, width]
    int64_t width;
};

// One pool of KV pages. A block is one contiguous run; inside it, in order, [layer][kv_head] and
// there the K page, then the V page. Per group of 16 tokens a K page holds [head_dim / depth][16]
// [depth] (one vector is 16 tokens at one depth) and a V page [16 / depth][head_dim][depth].
struct Pages {
    char* base;
    int64_t num_blocks;
    int64_t block_bytes;
    int64_t page_bytes;  // of K alone
    int num_layers, num_kv_heads, head_dim, block_size;
    Dtype dtype;
};

static inline char* k_page(const Pages& pages, int64_t block, int layer, int kv_head) {
    const int64_t pair = static_cast<int64_t>(layer) * pages.num_kv_heads + kv_head;
    return pages.base + block * pages.block_bytes + pair * 2 * pages.page_bytes;
}

// Query rows of one sequence that share their loads of K and V.
struct Unit {
    int32_t seq;
    int32_t first_token;  // row of the step
    int32_t num_tokens;
};

// A step's geometry, the same for all layers. Filled and checked by StepPlan.
struct StepView {
    Pages pages;
    const int32_t* positions;      // [num_tokens]
    const int32_t* token_blocks;   // [num_tokens] block that holds the token
    const int32_t* sequences;      // [num_tokens] sequence of the token
    const int32_t* block_table;    // [num_seqs, max_blocks]
    const Unit* units;             // [num_units]
    int32_t num_tokens, max_blocks, num_units;
};

struct AttentionParams {
    int num_heads, num_kv_heads, head_dim;
    float scale;
    int64_t window;         // tokens a query sees, itself included
    const float* cos;       // [max_position, head_dim / 2]
    const float* sin;
    const float* q_norm;    // [head_dim] or null
    const float* k_norm;
    float norm_eps;
};

struct StoreCall {
    const AttentionParams* params;
    const StepView* step;
    int layer;
    const float* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    void* query;       // [num_tokens, num_heads * head_dim] activation type
};

struct AttendCall {
    const AttentionParams* params;
    const StepView* step;
    int layer;
    const void* query;
    void* out;      // [num_tokens, num_heads * head_dim] activation type
    char* scratch;  // of this thread: at least scratch_bytes()
};

// One instruction set's kernels. Ranges are [first, last).
struct Kernels {
    const char* name;
    void (*linear)(Dtype, const LinearParams&, int64_t first_panel, int64_t last_panel);
    int64_t (*quantised_rows)(Dtype);  // up to how many rows linear() reads LinearParams::quantised
    void (*rms_norm)(Dtype, const NormParams&, int64_t first_row, int64_t last_row);
    void (*embed)(Dtype, const EmbedParams&, int64_t first_row, int64_t last_row);
    void (*store)(Dtype, const StoreCall&, int64_t first_token, int64_t last_token);
    // Items are (unit, kv_head) pairs, kv_head fastest.
    void (*attend)(Dtype, const AttendCall&, int64_t first_item, int64_t last_item);
    float (*read)(const char* bytes, int64_t num_lines);
};

static inline int64_t group_bytes(Storage storage) {
    if (storage == Storage::Q8) return kPanel * kScaled + kPanel * 2;
    return kPanel * kScaled / 2 + 2 * kPanel * (storage == Storage::Q4_F32 ? 4 : 2);
}

constexpr int kRowsPerUnit = 24;  // query rows (token, head) that a unit aims at

static inline int rows_per_unit(int group) { return group > kRowsPerUnit ? group : kRowsPerUnit / group * group; }

static inline size_t scratch_bytes(int group, int head_dim) {
    const size_t rows = static_cast<size_t>(rows_per_unit(group));
    return rows * (kChunk * 2 + static_cast<size_t>(head_dim) * 2 + 3) * sizeof(float) + 4096;
}

}  // namespace nodeserve::cpu
