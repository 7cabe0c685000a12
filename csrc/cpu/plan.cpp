#include "cpu/plan.h"

#include <algorithm>

#include "cpu/require.h"

namespace nodeserve::cpu {

void StepPlan::check(const Pages& pages, const StepArrays& a) {
    require(a.num_tokens >= 1, "positions: a step needs at least one token");
    require(a.num_seqs >= 1 && a.query_starts[0] == 0 && a.query_starts[a.num_seqs] == a.num_tokens,
            "query_starts must begin with 0 and end with the number of tokens");
    max_position_ = 0;
    for (int64_t s = 0; s < a.num_seqs; ++s) {
        const int64_t first = a.query_starts[s], last = a.query_starts[s + 1];
        require(first < last && last <= a.num_tokens, "query_starts must increase: every sequence has a token");
        const int64_t context = a.context_lens[s];
        require(context >= last - first, "context_lens: shorter than the sequence's tokens in this step");
        const int64_t num_blocks = (context + pages.block_size - 1) / pages.block_size;
        require(num_blocks <= a.max_blocks, "block_table has too few columns for context_lens");
        for (int64_t i = first; i < last; ++i)
            require(a.positions[i] == context - (last - i),
                    "positions must be the last ones of each sequence's context");
        const int32_t* const row = a.block_table + s * a.max_blocks;
        for (int64_t b = 0; b < num_blocks; ++b)
            require(row[b] >= 0 && row[b] < pages.num_blocks, "block_table: a block id is outside the pool");
        max_position_ = std::max(max_position_, static_cast<int>(context - 1));
    }
}

void StepPlan::place_tokens(const StepArrays& a) {
    positions_.assign(a.positions, a.positions + a.num_tokens);
    table_.assign(a.block_table, a.block_table + a.num_seqs * a.max_blocks);
    token_blocks_.resize(static_cast<size_t>(a.num_tokens));
    sequences_.resize(static_cast<size_t>(a.num_tokens));
    for (int64_t s = 0; s < a.num_seqs; ++s)
        for (int64_t i = a.query_starts[s]; i < a.query_starts[s + 1]; ++i) {
            const int64_t block = a.positions[i] / view_.pages.block_size;
            token_blocks_[static_cast<size_t>(i)] = table_[static_cast<size_t>(s * a.max_blocks + block)];
            sequences_[static_cast<size_t>(i)] = static_cast<int32_t>(s);
        }
}

void StepPlan::make_units(const StepArrays& a, int group) {
    const int tokens_per_unit = rows_per_unit(group) / group;
    units_.clear();
    costs_.clear();
    int64_t cost = 0;
    for (int64_t s = 0; s < a.num_seqs; ++s) {
        const int32_t last = a.query_starts[s + 1];
        for (int32_t i = a.query_starts[s]; i < last; i += tokens_per_unit) {
            const int32_t num_tokens = std::min(tokens_per_unit, last - i);
            units_.push_back({static_cast<int32_t>(s), i, num_tokens});
            cost += (a.positions[i] + num_tokens + 32) * (num_tokens * group / 6 + 1);
            costs_.push_back(cost);
        }
    }
}

void StepPlan::split(int num_chunks) {
    const int64_t heads = view_.pages.num_kv_heads;
    const int64_t num_items = static_cast<int64_t>(units_.size()) * heads;
    const int64_t num_tokens = view_.num_tokens;
    item_splits_.assign(1, 0);
    token_splits_.assign(1, 0);
    for (int c = 1; c < num_chunks; ++c) {
        const int64_t target = costs_.back() * c / num_chunks;
        const auto unit = std::lower_bound(costs_.begin(), costs_.end(), target) - costs_.begin();
        const int64_t before = unit ? costs_[static_cast<size_t>(unit - 1)] : 0;
        const int64_t inside = (target - before) * heads / (costs_[static_cast<size_t>(unit)] - before);
        item_splits_.push_back(std::min(num_items, unit * heads + inside));
        int64_t token = num_tokens * c / num_chunks;
        while (token < num_tokens && positions_[static_cast<size_t>(token)] % kGroup != 0 &&
               token > 0 && sequences_[static_cast<size_t>(token)] == sequences_[static_cast<size_t>(token - 1)])
            ++token;
        token_splits_.push_back(token);
    }
    item_splits_.push_back(num_items);
    token_splits_.push_back(num_tokens);
}

void StepPlan::prepare(const Pages& pages, const StepArrays& arrays, int num_heads, int num_chunks) {
    check(pages, arrays);
    view_.pages = pages;
    view_.num_tokens = static_cast<int32_t>(arrays.num_tokens);
    view_.max_blocks = static_cast<int32_t>(arrays.max_blocks);
    place_tokens(arrays);
    make_units(arrays, num_heads / pages.num_kv_heads);
    view_.positions = positions_.data();
    view_.token_blocks = token_blocks_.data();
    view_.sequences = sequences_.data();
    view_.block_table = table_.data();
    view_.units = units_.data();
    view_.num_units = static_cast<int32_t>(units_.size());
    split(num_chunks);
}

}  // namespace nodeserve::cpu
