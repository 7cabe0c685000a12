// A step's geometry: checked once, used by every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/params.h"

namespace nodeserve::cpu {

struct StepArrays {
    const int32_t* positions;     // [num_tokens]
    const int32_t* query_starts;  // [num_seqs + 1]
    const int32_t* context_lens;  // [num_seqs]
    const int32_t* block_table;   // [num_seqs, max_blocks]
    int64_t num_tokens, num_seqs, max_blocks;
};

class StepPlan {
  public:
    // Throws std::invalid_argument, naming the array, for anything a kernel could not trust. Copies
    // what it needs: the arrays may go afterwards.
    void prepare(const Pages& pages, const StepArrays& arrays, int num_heads, int num_chunks);

    const StepView& view() const { return view_; }
    int max_position() const { return max_position_; }

    // First item of each chunk of attention; the last entry is the number of items.
    const std::vector<int64_t>& item_splits() const { return item_splits_; }
    // The same for tokens. A group of 16 tokens of one sequence is never cut (see store.inl).
    const std::vector<int64_t>& token_splits() const { return token_splits_; }

  private:
    void check(const Pages& pages, const StepArrays& arrays);
    void place_tokens(const StepArrays& arrays);
    void make_units(const StepArrays& arrays, int group);
    void split(int num_chunks);

    StepView view_{};
    int max_position_ = 0;
    std::vector<int32_t> positions_, token_blocks_, sequences_, table_;
    std::vector<Unit> units_;
    std::vector<int64_t> costs_;  // running sum over units
    std::vector<int64_t> item_splits_, token_splits_;
};

}  // namespace nodeserve::cpu
