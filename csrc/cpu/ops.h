// Kernels bound to their weights and a team: what Python calls once per layer and step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/pack.h"
#include "cpu/params.h"
#include "cpu/plan.h"
#include "cpu/team.h"

namespace nodeserve::cpu {

// A team, the kernels it runs, and the time spent in them.
class Engine {
  public:
    Engine(int num_threads, std::vector<int> cpus, const std::string& isa);

    Team team;
    const Kernels& kernels;
    int64_t busy_ns = 0;  // inside run(), by the calling thread's clock

    // body(member, chunk) for each chunk.
    template <class F>
    void run(int num_chunks, const F& body) {
        const int64_t start = now_ns();
        team.run(num_chunks, body);
        busy_ns += now_ns() - start;
    }
    // body(first, last) on equal parts of [0, count); in one part if it is not worth sharing.
    template <class F>
    void share(int64_t count, bool worth_sharing, const F& body) {
        const int64_t most = worth_sharing ? num_chunks() : 1;
        const int64_t chunks = count < most ? (count > 0 ? count : 1) : most;
        run(static_cast<int>(chunks), [&](int, int chunk) {
            body(count * chunk / chunks, count * (chunk + 1) / chunks);
        });
    }
    // Into how many parts work is cut: a few per member, so that a late one can do less.
    int num_chunks() const { return team.size() == 1 ? 1 : kChunksPerMember * team.size(); }
    char* scratch(int member, size_t num_bytes);

  private:
    static constexpr int kChunksPerMember = 4;
    static int64_t now_ns();
    std::vector<std::vector<char>> scratch_;
};

using EnginePtr = std::shared_ptr<Engine>;

class Linear {
  public:
    Linear(EnginePtr engine, Dtype dtype, LinearParams params);
    void run(const void* x, void* out, int64_t rows);

  private:
    EnginePtr engine_;
    Dtype dtype_;
    LinearParams params_;
    int64_t num_shares_;
};

class RmsNorm {
  public:
    RmsNorm(EnginePtr engine, Dtype dtype, NormParams params);
    void run(const float* x, void* out, int64_t rows);

  private:
    EnginePtr engine_;
    Dtype dtype_;
    NormParams params_;
};

class Embedding {
  public:
    Embedding(EnginePtr engine, Dtype dtype, EmbedParams params, int64_t vocab_size);
    void run(const int32_t* token_ids, float* out, int64_t rows);

  private:
    EnginePtr engine_;
    Dtype dtype_;
    EmbedParams params_;
    int64_t vocab_size_;
};

class Attention {
  public:
    Attention(EnginePtr engine, Dtype dtype, AttentionParams params, int64_t max_position);
    void store(const StepPlan& plan, int layer, const float* qkv, void* query);
    void attend(const StepPlan& plan, int layer, const void* query, void* out);

  private:
    void check(const StepPlan& plan, int layer) const;

    EnginePtr engine_;
    Dtype dtype_;
    AttentionParams params_;
    int64_t max_position_;
};

// Throws unless a weight of this shape can be packed so.
void require_quantised(Storage storage, int64_t n, int64_t k);
void pack(Engine& engine, const PackParams& params);
void pack_quantised(Engine& engine, const PackQuantisedParams& params);

}  // namespace nodeserve::cpu
