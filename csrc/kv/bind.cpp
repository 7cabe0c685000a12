// nodeserve._cuda: pools, streams, events and page copies. This file only binds.
//
// Whatever may wait for a device gives the GIL away. One thread at a time uses an object.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>

#include "check.h"
#include "kv/copy.h"
#include "kv/device.h"
#include "kv/pool.h"
#include "kv/stream.h"

namespace py = pybind11;
namespace kv = nodeserve::kv;

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

py::object typed(const char* name) { return py::module_::import("nodeserve.errors").attr(name); }

void translate(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const nodeserve::BadArgument& error) {
        py::set_error(typed("BadArgument"), error.what());
    } catch (const nodeserve::CudaFailure& error) {
        const py::object type = typed("CudaError");
        PyErr_SetObject(type.ptr(), type(error.what(), error.number, error.name).ptr());
    }
}

// A copy of a [rows, columns] buffer, which the caller may then change.
template <class Row, class Value>
std::vector<Row> rows_of(const py::buffer& buffer, const char* name, py::ssize_t num_columns) {
    static_assert(sizeof(Row) % sizeof(Value) == 0);
    const py::buffer_info info = buffer.request();
    NS_REQUIRE(info.item_type_is_equivalent_to<Value>(),
               name << " must hold int" << 8 * sizeof(Value) << ", got the format \"" << info.format << '"');
    NS_REQUIRE(info.ndim == 2 && info.shape[1] == num_columns, name << " must have the shape [n, " << num_columns << ']');
    NS_REQUIRE(info.shape[0] == 0 || (info.strides[1] == info.itemsize && info.strides[0] == info.itemsize * num_columns),
               name << " must be contiguous");
    std::vector<Row> rows(static_cast<std::size_t>(info.shape[0]));
    if (!rows.empty()) std::memcpy(rows.data(), info.ptr, rows.size() * sizeof(Row));
    return rows;
}

kv::Method method_named(const std::string& name) {
    if (name == "auto") return kv::Method::AUTO;
    if (name == "kernel") return kv::Method::KERNEL;
    NS_REQUIRE(name == "batch", "method must be \"auto\", \"kernel\" or \"batch\", got \"" << name << '"');
    return kv::Method::BATCH;
}

int copy_pages(kv::Address target, std::int64_t target_bytes, kv::Address source, std::int64_t source_bytes,
               const py::buffer& pairs, const py::buffer& runs, std::int64_t target_stride, std::int64_t source_stride,
               kv::StreamHandle stream, const std::string& method_name, int max_thread_blocks) {
    const auto pair_rows = rows_of<kv::Pair, std::int32_t>(pairs, "pairs", 2);
    const auto run_rows = rows_of<kv::Run, std::int64_t>(runs, "runs", 3);
    const kv::Method method = method_named(method_name);
    const py::gil_scoped_release no_gil;
    const auto request = kv::checked_request({target, target_bytes, target_stride}, {source, source_bytes, source_stride},
                                             pair_rows, run_rows);
    return kv::copy_pages(request, stream, method, max_thread_blocks);
}

void bind_pools(py::module_& module) {
    py::class_<kv::Pool>(module, "Pool", py::module_local())
        .def(py::init<int, std::int64_t>(), py::arg("device"), py::arg("num_bytes"), NoGil())
        .def_property_readonly("device", &kv::Pool::device)
        .def_property_readonly("num_bytes", &kv::Pool::num_bytes)
        .def_property_readonly("address", &kv::Pool::address)
        .def("handle", [](const kv::Pool& self) { return py::bytes(self.handle()); })
        .def("close", &kv::Pool::close, NoGil());
    py::class_<kv::PeerPool>(module, "PeerPool", py::module_local())
        .def(py::init([](int device, const py::bytes& handle, std::int64_t num_bytes) {
                 const std::string bytes = handle;
                 const py::gil_scoped_release no_gil;
                 return std::make_unique<kv::PeerPool>(device, bytes, num_bytes);
             }),
             py::arg("device"), py::arg("handle"), py::arg("num_bytes"))
        .def_property_readonly("num_bytes", &kv::PeerPool::num_bytes)
        .def_property_readonly("address", &kv::PeerPool::address)
        .def("close", &kv::PeerPool::close, NoGil());
    py::class_<kv::HostPages>(module, "HostPages", py::module_local())
        .def(py::init<kv::Address, std::int64_t, int>(), py::arg("address"), py::arg("num_bytes"), py::arg("device") = 0,
             NoGil())
        .def_property_readonly("num_bytes", &kv::HostPages::num_bytes)
        .def_property_readonly("address", &kv::HostPages::address)
        .def("close", &kv::HostPages::close, NoGil());
}

void bind_order(py::module_& module) {
    py::class_<kv::Stream>(module, "Stream", py::module_local())
        .def(py::init<int, bool>(), py::arg("device"), py::arg("high_priority") = false, NoGil())
        .def_property_readonly("handle",
                               [](const kv::Stream& self) { return reinterpret_cast<kv::StreamHandle>(self.get()); })
        .def("synchronize", &kv::Stream::synchronize, NoGil())
        .def("close", &kv::Stream::close, NoGil());
    py::class_<kv::Event>(module, "Event", py::module_local())
        .def(py::init<int, bool, bool>(), py::arg("device"), py::kw_only(), py::arg("interprocess") = false,
             py::arg("timed") = false, NoGil())
        .def_static(
            "open",
            [](int device, const py::bytes& handle) {
                const std::string bytes = handle;
                const py::gil_scoped_release no_gil;
                return std::make_unique<kv::Event>(device, bytes);
            },
            py::arg("device"), py::arg("handle"))
        .def("handle", [](const kv::Event& self) { return py::bytes(self.handle()); })
        .def("record", &kv::Event::record, py::arg("stream"), NoGil())
        .def("make_wait", &kv::Event::make_wait, py::arg("stream"), NoGil())
        .def("done", &kv::Event::done)
        .def("synchronize", &kv::Event::synchronize, NoGil())
        .def("elapsed_ms", &kv::Event::elapsed_ms, py::arg("earlier"))
        .def("close", &kv::Event::close, NoGil());
}

}  // namespace

void bind_kv(py::module_& module) {
    py::register_local_exception_translator(translate);
    module.attr("CudaError") = typed("CudaError");
    module.def("device_count", &kv::device_count, NoGil());
    module.def("can_access_peer", &kv::can_access_peer, py::arg("device"), py::arg("peer"), NoGil());
    module.def("memory", &kv::memory, py::arg("device"), NoGil());
    bind_pools(module);
    bind_order(module);
    module.def("copy_pages", &copy_pages, py::arg("target"), py::arg("target_bytes"), py::arg("source"),
               py::arg("source_bytes"), py::arg("pairs"), py::arg("runs"), py::kw_only(), py::arg("target_stride"),
               py::arg("source_stride"), py::arg("stream"), py::arg("method") = "auto", py::arg("max_thread_blocks") = 0);
}
