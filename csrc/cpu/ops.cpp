#include "cpu/ops.h"

#include <chrono>

#include "cpu/levels.h"
#include "cpu/require.h"

namespace nodeserve::cpu {
namespace {

// Below this many elements waking the team costs more than it saves.
constexpr int64_t kWorthSharing = 1 << 15;

void require_whole_groups(Storage storage, int64_t k) {
    require(storage == Storage::NONE || k % kScaled == 0, "k of a quantised weight must be a multiple of 32");
}

}  // namespace

void require_quantised(Storage storage, int64_t n, int64_t k) {
    require(storage != Storage::NONE, "storage must be q4, q4_f32 or q8");
    require(n >= 1 && k >= 1, "n and k must be at least 1");
    require_whole_groups(storage, k);
}

Engine::Engine(int num_threads, std::vector<int> cpus, const std::string& isa)
    : team(num_threads, std::move(cpus)),
      kernels(kernels_named(isa)),
      scratch_(static_cast<size_t>(num_threads)) {}

int64_t Engine::now_ns() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

char* Engine::scratch(int member, size_t num_bytes) {
    std::vector<char>& own = scratch_[static_cast<size_t>(member)];
    if (own.size() < num_bytes + 64) own.resize(num_bytes + 64);
    return own.data() + (64 - reinterpret_cast<uintptr_t>(own.data()) % 64) % 64;
}

Linear::Linear(EnginePtr engine, Dtype dtype, LinearParams params)
    : engine_(std::move(engine)), dtype_(dtype), params_(params) {
    require(params.weight != nullptr, "weight must not be null");
    require(params.n >= 1 && params.k >= 1, "n and k must be at least 1");
    const bool silu = params.epilogue == Epilogue::SILU_MUL;
    require(!silu || (params.n % 2 == 0 && params.bias == nullptr),
            "epilogue silu_mul needs an even n and no bias");
    const Storage storage = params.quantised.storage;
    require((storage == Storage::NONE) == (params.quantised.groups == nullptr),
            "quantised must be null with storage none, and only there");
    require_whole_groups(storage, params.k);
    require(storage == Storage::NONE || engine_->kernels.quantised_rows(dtype) > 0,
            "storage must be none: these kernels read no quantised weight of this dtype");
    num_shares_ = num_panels(params.n, params.epilogue);
}

void Linear::run(const void* x, void* out, int64_t rows) {
    require(x != nullptr && out != nullptr, "x and out must not be null");
    require(rows >= 0, "rows must not be negative");
    if (rows == 0) return;
    LinearParams params = params_;
    params.x = x;
    params.out = out;
    params.rows = rows;
    engine_->share(num_shares_, true, [&](int64_t first, int64_t last) {
        engine_->kernels.linear(dtype_, params, first, last);
    });
}

RmsNorm::RmsNorm(EnginePtr engine, Dtype dtype, NormParams params)
    : engine_(std::move(engine)), dtype_(dtype), params_(params) {
    require(params.weight != nullptr, "weight must not be null");
    require(params.width >= 1, "width must be at least 1");
}

void RmsNorm::run(const float* x, void* out, int64_t rows) {
    require(x != nullptr && out != nullptr, "x and out must not be null");
    require(rows >= 0, "rows must not be negative");
    NormParams params = params_;
    params.x = x;
    params.out = out;
    engine_->share(rows, rows * params.width >= kWorthSharing, [&](int64_t first, int64_t last) {
        engine_->kernels.rms_norm(dtype_, params, first, last);
    });
}

Embedding::Embedding(EnginePtr engine, Dtype dtype, EmbedParams params, int64_t vocab_size)
    : engine_(std::move(engine)), dtype_(dtype), params_(params), vocab_size_(vocab_size) {
    require(params.table != nullptr, "table must not be null");
    require(params.width >= 1, "width must be at least 1");
    require(vocab_size >= 1, "vocab_size must be at least 1");
}

void Embedding::run(const int32_t* token_ids, float* out, int64_t rows) {
    require(token_ids != nullptr && out != nullptr, "token_ids and out must not be null");
    require(rows >= 0, "rows must not be negative");
    for (int64_t i = 0; i < rows; ++i)
        require(token_ids[i] >= 0 && token_ids[i] < vocab_size_, "token_ids: one is outside the vocabulary");
    EmbedParams params = params_;
    params.token_ids = token_ids;
    params.out = out;
    engine_->share(rows, rows * params.width >= kWorthSharing, [&](int64_t first, int64_t last) {
        engine_->kernels.embed(dtype_, params, first, last);
    });
}

Attention::Attention(EnginePtr engine, Dtype dtype, AttentionParams params, int64_t max_position)
    : engine_(std::move(engine)), dtype_(dtype), params_(params), max_position_(max_position) {
    require(params.num_kv_heads >= 1 && params.num_heads >= 1 &&
                params.num_heads % params.num_kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads");
    require(params.head_dim % kLanes == 0 && params.head_dim >= kLanes && params.head_dim <= 256,
            "head_dim must be a multiple of 16 up to 256");
    require(params.cos != nullptr && params.sin != nullptr, "cos and sin must not be null");
    require(params.window >= 1, "window must be at least 1");
}

void Attention::check(const StepPlan& plan, int layer) const {
    const Pages& pages = plan.view().pages;
    require(pages.base != nullptr, "plan has not been prepared");
    require(pages.num_kv_heads == params_.num_kv_heads && pages.head_dim == params_.head_dim &&
                pages.dtype == dtype_,
            "plan was prepared for pages of another shape");
    require(static_cast<int>(plan.item_splits().size()) == engine_->num_chunks() + 1,
            "plan was prepared for another number of threads");
    require(layer >= 0 && layer < pages.num_layers, "layer is outside the pages");
    require(plan.max_position() < max_position_, "plan: a position is beyond the rotary table");
}

void Attention::store(const StepPlan& plan, int layer, const float* qkv, void* query) {
    check(plan, layer);
    require(qkv != nullptr && query != nullptr, "qkv and query must not be null");
    const StoreCall call{&params_, &plan.view(), layer, qkv, query};
    const int64_t num_tokens = plan.view().num_tokens;
    const int64_t row = (params_.num_heads + 2 * params_.num_kv_heads) * params_.head_dim;
    if (num_tokens * row < kWorthSharing)
        return engine_->run(1, [&](int, int) { engine_->kernels.store(dtype_, call, 0, num_tokens); });
    engine_->run(engine_->num_chunks(), [&](int, int chunk) {
        const auto* const splits = plan.token_splits().data() + chunk;
        engine_->kernels.store(dtype_, call, splits[0], splits[1]);
    });
}

void Attention::attend(const StepPlan& plan, int layer, const void* query, void* out) {
    check(plan, layer);
    require(query != nullptr && out != nullptr, "query and out must not be null");
    const size_t num_bytes = scratch_bytes(params_.num_heads / params_.num_kv_heads, params_.head_dim);
    engine_->run(engine_->num_chunks(), [&](int member, int chunk) {
        const AttendCall call{&params_, &plan.view(), layer, query, out,
                              engine_->scratch(member, num_bytes)};
        const auto* const splits = plan.item_splits().data() + chunk;
        engine_->kernels.attend(dtype_, call, splits[0], splits[1]);
    });
}

void pack(Engine& engine, const PackParams& params) {
    require(params.weight != nullptr && params.out != nullptr, "weight and out must not be null");
    require(params.n >= 1 && params.k >= 1, "n and k must be at least 1");
    const int64_t panels = num_panels(params.n, params.epilogue);
    engine.share(panels, true, [&](int64_t first, int64_t last) { pack_panels(params, first, last); });
}

void pack_quantised(Engine& engine, const PackQuantisedParams& params) {
    require_quantised(params.storage, params.n, params.k);
    require(params.q != nullptr && params.scale != nullptr && params.out != nullptr,
            "q, scale and out must not be null");
    require((params.low == nullptr) == (params.storage == Storage::Q8), "low must be null for q8, and only there");
    const int64_t panels = num_panels(params.n, params.epilogue);
    engine.share(panels, true, [&](int64_t first, int64_t last) {
        pack_quantised_panels(params, first, last);
    });
}

}  // namespace nodeserve::cpu
