// Python's view of the CPU kernels: addresses and sizes in, ValueError for what cannot be.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "cpu/levels.h"
#include "cpu/ops.h"
#include "cpu/require.h"

namespace py = pybind11;

namespace nodeserve::cpu {
namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Dtype dtype_named(const std::string& name) {
    if (name == "bfloat16") return Dtype::BF16;
    if (name == "float32") return Dtype::F32;
    if (name == "float16") return Dtype::F16;
    throw std::invalid_argument("dtype must be bfloat16, float32 or float16, got '" + name + "'");
}

Epilogue epilogue_named(const std::string& name) {
    if (name == "store") return Epilogue::STORE;
    if (name == "store_f32") return Epilogue::STORE_F32;
    if (name == "add_f32") return Epilogue::ADD_F32;
    if (name == "silu_mul") return Epilogue::SILU_MUL;
    throw std::invalid_argument("epilogue must be store, store_f32, add_f32 or silu_mul, got '" + name + "'");
}

Storage storage_named(const std::string& name) {
    if (name == "none") return Storage::NONE;
    if (name == "q4") return Storage::Q4;
    if (name == "q4_f32") return Storage::Q4_F32;
    if (name == "q8") return Storage::Q8;
    throw std::invalid_argument("storage must be none, q4, q4_f32 or q8, got '" + name + "'");
}

py::buffer_info bytes_of(const py::buffer& buffer, const char* name, bool writable) {
    py::buffer_info info;
    try {
        info = buffer.request(writable);
    } catch (const py::error_already_set&) {
        throw std::invalid_argument(std::string(name) + " must be a writable buffer");
    } catch (const py::buffer_error&) {
        throw std::invalid_argument(std::string(name) + " must be a writable buffer");
    }
    require(info.ndim == 1 && info.strides[0] == info.itemsize, std::string(name) + " must be contiguous");
    return info;
}

// Pages, and the pool they lie in kept alive.
struct OwnedPages {
    py::buffer pool;
    Pages pages;
};

OwnedPages make_pages(const py::buffer& pool, int num_layers, int num_kv_heads, int head_dim,
                      int block_size, const std::string& dtype) {
    require(num_layers >= 1, "num_layers must be at least 1");
    require(num_kv_heads >= 1, "num_kv_heads must be at least 1");
    require(head_dim >= kLanes && head_dim <= 256 && head_dim % kLanes == 0,
            "head_dim must be a multiple of 16 up to 256");
    require(block_size >= kGroup && block_size % kGroup == 0, "block_size must be a multiple of 16");
    const py::buffer_info info = bytes_of(pool, "pool", true);
    Pages pages{};
    pages.dtype = dtype_named(dtype);
    pages.base = static_cast<char*>(info.ptr);
    pages.page_bytes = static_cast<int64_t>(block_size) * head_dim * element_bytes(pages.dtype);
    pages.block_bytes = pages.page_bytes * 2 * num_kv_heads * num_layers;
    pages.num_blocks = info.size * info.itemsize / pages.block_bytes;
    pages.num_layers = num_layers;
    pages.num_kv_heads = num_kv_heads;
    pages.head_dim = head_dim;
    pages.block_size = block_size;
    require(pages.num_blocks >= 1, "pool is smaller than one block");
    return {pool, pages};
}

void prepare(StepPlan& plan, Engine& engine, const OwnedPages& owned, int num_heads, Address positions,
             Address query_starts, Address context_lens, Address block_table, int64_t num_tokens,
             int64_t num_seqs, int64_t max_blocks) {
    require(positions && query_starts && context_lens && block_table,
            "positions, query_starts, context_lens and block_table must not be null");
    require(num_heads >= 1 && num_heads % owned.pages.num_kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads");
    const StepArrays arrays{at<int32_t>(positions), at<int32_t>(query_starts), at<int32_t>(context_lens),
                            at<int32_t>(block_table), num_tokens, num_seqs, max_blocks};
    plan.prepare(owned.pages, arrays, num_heads, engine.num_chunks());
}

// Offsets inside a target and a source block, and bytes.
using Run = std::array<int64_t, 3>;

void check_runs(const std::vector<Run>& runs, int64_t dst_block_bytes, int64_t src_block_bytes) {
    for (const auto& [to, from, size] : runs) {
        require(size >= 1 && to >= 0 && from >= 0, "runs: offsets and bytes must not be negative, nor bytes 0");
        require(to <= dst_block_bytes && size <= dst_block_bytes - to, "runs: one leaves the block of dst");
        require(from <= src_block_bytes && size <= src_block_bytes - from, "runs: one leaves the block of src");
    }
}

// Runs of blocks between two pools; what goes on in both without a gap is one copy. Checks all before
// it moves any.
void copy_blocks(const py::buffer& dst, const py::buffer& src, int64_t dst_block_bytes, int64_t src_block_bytes,
                 const std::vector<Run>& runs, const std::vector<int64_t>& dst_ids, const std::vector<int64_t>& src_ids) {
    require(dst_block_bytes >= 1, "dst_block_bytes must be at least 1");
    require(src_block_bytes >= 1, "src_block_bytes must be at least 1");
    check_runs(runs, dst_block_bytes, src_block_bytes);
    require(dst_ids.size() == src_ids.size(), "dst_ids and src_ids must be equally long");
    const py::buffer_info to = bytes_of(dst, "dst", true), from = bytes_of(src, "src", false);
    for (const int64_t id : dst_ids)
        require(id >= 0 && id < to.size * to.itemsize / dst_block_bytes, "dst_ids: a block is outside dst");
    for (const int64_t id : src_ids)
        require(id >= 0 && id < from.size * from.itemsize / src_block_bytes, "src_ids: a block is outside src");
    const py::gil_scoped_release no_gil;
    char* out = nullptr;
    const char* in = nullptr;
    size_t size = 0;  // of the copy that is still to be made
    for (size_t i = 0; i < dst_ids.size(); ++i) {
        for (const Run& run : runs) {
            char* const next_out = static_cast<char*>(to.ptr) + dst_ids[i] * dst_block_bytes + run[0];
            const char* const next_in = static_cast<const char*>(from.ptr) + src_ids[i] * src_block_bytes + run[1];
            if (size == 0 || next_out != out + size || next_in != in + size) {
                if (size != 0) std::memmove(out, in, size);
                out = next_out;
                in = next_in;
                size = 0;
            }
            size += static_cast<size_t>(run[2]);
        }
    }
    if (size != 0) std::memmove(out, in, size);
}

AttentionParams attention_params(int num_heads, int num_kv_heads, int head_dim, float scale, int64_t window,
                                 Address cos, Address sin, Address q_norm, Address k_norm, float norm_eps) {
    return {num_heads, num_kv_heads, head_dim, scale, window, at<const float>(cos), at<const float>(sin),
            at<const float>(q_norm), at<const float>(k_norm), norm_eps};
}

void bind_engine(py::module_& module) {
    py::class_<Engine, EnginePtr>(module, "CpuEngine")
        .def(py::init<int, std::vector<int>, const std::string&>(), py::arg("num_threads") = 1,
             py::arg("cpus") = std::vector<int>{}, py::arg("isa") = "")
        .def_property_readonly("isa", [](const Engine& engine) { return engine.kernels.name; })
        .def(
            "quantised_rows",
            [](const Engine& engine, const std::string& dtype) {
                return engine.kernels.quantised_rows(dtype_named(dtype));
            },
            py::arg("dtype"))
        .def_property_readonly("num_threads", [](const Engine& engine) { return engine.team.size(); })
        .def_property_readonly("busy_seconds", [](const Engine& engine) { return 1e-9 * static_cast<double>(engine.busy_ns); });
    module.def("cpu_isa", [] { return available_kernels().front()->name; });
    module.def("cpu_isas", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    module.def(
        "cpu_packed_bytes",
        [](const std::string& dtype, int64_t n, int64_t k, const std::string& epilogue) {
            require(n >= 1 && k >= 1, "n and k must be at least 1");
            return packed_bytes(dtype_named(dtype), n, k, epilogue_named(epilogue));
        },
        py::arg("dtype"), py::arg("n"), py::arg("k"), py::arg("epilogue"));
    module.def(
        "cpu_quantised_bytes",
        [](const std::string& storage, int64_t n, int64_t k, const std::string& epilogue) {
            const Storage wanted = storage_named(storage);
            require_quantised(wanted, n, k);
            return quantised_bytes(wanted, n, k, epilogue_named(epilogue));
        },
        py::arg("storage"), py::arg("n"), py::arg("k"), py::arg("epilogue"));
    module.def(
        "cpu_pack",
        [](Engine& engine, const std::string& dtype, Address weight, Address out, int64_t n, int64_t k,
           const std::string& epilogue) {
            const PackParams params{at<const char>(weight), at<char>(out), n, k, dtype_named(dtype),
                                    epilogue_named(epilogue)};
            const py::gil_scoped_release no_gil;
            pack(engine, params);
        },
        py::arg("engine"), py::arg("dtype"), py::arg("weight"), py::arg("out"), py::arg("n"), py::arg("k"),
        py::arg("epilogue"));
    module.def(
        "cpu_pack_quantised",
        [](Engine& engine, const std::string& dtype, const std::string& storage, Address q, Address scale,
           Address low, Address out, int64_t n, int64_t k, const std::string& epilogue) {
            const PackQuantisedParams params{
                at<const uint8_t>(q), at<const float>(scale), at<const float>(low),     at<char>(out), n, k,
                dtype_named(dtype),   epilogue_named(epilogue), storage_named(storage)};
            const py::gil_scoped_release no_gil;
            pack_quantised(engine, params);
        },
        py::arg("engine"), py::arg("dtype"), py::arg("storage"), py::arg("q"), py::arg("scale"), py::arg("low"),
        py::arg("out"), py::arg("n"), py::arg("k"), py::arg("epilogue"));
    module.def(
        "cpu_read",
        [](Engine& engine, Address address, int64_t num_bytes) {
            require(address != 0, "address must not be null");
            require(num_bytes >= 0, "num_bytes must not be negative");
            engine.share(num_bytes / 64, true, [&](int64_t first, int64_t last) {
                engine.kernels.read(at<const char>(address) + first * 64, last - first);
            });
        },
        py::arg("engine"), py::arg("address"), py::arg("num_bytes"), NoGil());
    module.def("copy_blocks", &copy_blocks, py::arg("dst"), py::arg("src"), py::arg("dst_block_bytes"),
               py::arg("src_block_bytes"), py::arg("runs"), py::arg("dst_ids"), py::arg("src_ids"));
}

void bind_layers(py::module_& module) {
    py::class_<Linear>(module, "CpuLinear")
        .def(py::init([](EnginePtr engine, const std::string& dtype, Address weight, Address bias, int64_t n,
                         int64_t k, const std::string& epilogue, const std::string& storage, Address quantised,
                         float zero) {
                 return Linear(std::move(engine), dtype_named(dtype),
                               {at<const void>(weight), at<const float>(bias), nullptr, nullptr, 0, n, k,
                                epilogue_named(epilogue), {at<const char>(quantised), storage_named(storage), zero}});
             }),
             py::arg("engine"), py::arg("dtype"), py::arg("weight"), py::arg("bias"), py::arg("n"),
             py::arg("k"), py::arg("epilogue"), py::arg("storage") = "none", py::arg("quantised") = Address{0}, py::arg("zero") = 0.0f)
        .def(
            "__call__",
            [](Linear& self, Address x, Address out, int64_t rows) { self.run(at<void>(x), at<void>(out), rows); },
            py::arg("x"), py::arg("out"), py::arg("rows"), NoGil());
    py::class_<RmsNorm>(module, "CpuRmsNorm")
        .def(py::init([](EnginePtr engine, const std::string& dtype, Address weight, int64_t width, float eps) {
                 return RmsNorm(std::move(engine), dtype_named(dtype),
                                {nullptr, at<const float>(weight), nullptr, width, eps});
             }),
             py::arg("engine"), py::arg("dtype"), py::arg("weight"), py::arg("width"), py::arg("eps"))
        .def(
            "__call__",
            [](RmsNorm& self, Address x, Address out, int64_t rows) { self.run(at<float>(x), at<void>(out), rows); },
            py::arg("x"), py::arg("out"), py::arg("rows"), NoGil());
    py::class_<Embedding>(module, "CpuEmbedding")
        .def(py::init([](EnginePtr engine, const std::string& dtype, Address table, int64_t vocab_size, int64_t width) {
                 return Embedding(std::move(engine), dtype_named(dtype),
                                  {at<const void>(table), nullptr, nullptr, width}, vocab_size);
             }),
             py::arg("engine"), py::arg("dtype"), py::arg("table"), py::arg("vocab_size"), py::arg("width"))
        .def(
            "__call__",
            [](Embedding& self, Address token_ids, Address out, int64_t rows) {
                self.run(at<int32_t>(token_ids), at<float>(out), rows);
            },
            py::arg("token_ids"), py::arg("out"), py::arg("rows"), NoGil());
}

void bind_attention(py::module_& module) {
    py::class_<OwnedPages>(module, "CpuPages")
        .def(py::init(&make_pages), py::arg("pool"), py::arg("num_layers"), py::arg("num_kv_heads"),
             py::arg("head_dim"), py::arg("block_size"), py::arg("dtype"))
        .def_property_readonly("num_blocks", [](const OwnedPages& owned) { return owned.pages.num_blocks; })
        .def_property_readonly("block_bytes", [](const OwnedPages& owned) { return owned.pages.block_bytes; });
    py::class_<StepPlan>(module, "CpuPlan")
        .def(py::init<>())
        .def("prepare", &prepare, py::arg("engine"), py::arg("pages"), py::arg("num_heads"),
             py::arg("positions"), py::arg("query_starts"), py::arg("context_lens"), py::arg("block_table"),
             py::arg("num_tokens"), py::arg("num_seqs"), py::arg("max_blocks"));
    py::class_<Attention>(module, "CpuAttention")
        .def(py::init([](EnginePtr engine, const std::string& dtype, int num_heads, int num_kv_heads, int head_dim,
                         float scale, int64_t window, Address cos, Address sin, int64_t max_position, Address q_norm,
                         Address k_norm, float norm_eps) {
                 return Attention(std::move(engine), dtype_named(dtype),
                                  attention_params(num_heads, num_kv_heads, head_dim, scale, window, cos, sin,
                                                   q_norm, k_norm, norm_eps),
                                  max_position);
             }),
             py::arg("engine"), py::arg("dtype"), py::arg("num_heads"), py::arg("num_kv_heads"),
             py::arg("head_dim"), py::arg("scale"), py::arg("window"), py::arg("cos"), py::arg("sin"),
             py::arg("max_position"), py::arg("q_norm"), py::arg("k_norm"), py::arg("norm_eps"))
        .def(
            "store",
            [](Attention& self, const StepPlan& plan, int layer, Address qkv, Address query) {
                self.store(plan, layer, at<float>(qkv), at<void>(query));
            },
            py::arg("plan"), py::arg("layer"), py::arg("qkv"), py::arg("query"), NoGil())
        .def(
            "attend",
            [](Attention& self, const StepPlan& plan, int layer, Address query, Address out) {
                self.attend(plan, layer, at<void>(query), at<void>(out));
            },
            py::arg("plan"), py::arg("layer"), py::arg("query"), py::arg("out"), NoGil());
}

}  // namespace
}  // namespace nodeserve::cpu

void bind_cpu(py::module_& module) {
    nodeserve::cpu::bind_engine(module);
    nodeserve::cpu::bind_layers(module);
    nodeserve::cpu::bind_attention(module);
}
