// nodeserve._host.Ring: one end of a ring over any writable buffer. This file only binds.
//
// No call releases the GIL: the longest is one copy, and the GIL is what keeps the threads of one
// process from being two producers.
#include <pybind11/pybind11.h>

#include <limits>
#include <optional>

#include "ring/ring.h"

namespace py = pybind11;
namespace ns = nodeserve::ring;

namespace {

class BufferView {
  public:
    BufferView(py::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
    }
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;

    std::span<std::byte> bytes() const {
        return {static_cast<std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

  private:
    Py_buffer view_{};
};

template <typename Use>
auto with_bytes(py::handle record, Use&& use) {
    if (PyBytes_CheckExact(record.ptr())) {  // nearly always; saves half of a small put
        const auto* data = reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(record.ptr()));
        const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(record.ptr()));
        return use(std::span<const std::byte>(data, size));
    }
    const BufferView view(record, PyBUF_SIMPLE);
    return use(std::span<const std::byte>(view.bytes()));
}

class PyRing {
  public:
    PyRing(const py::object& buffer, bool create) {
        view_.emplace(buffer, PyBUF_WRITABLE);
        ring_.emplace(create ? ns::Ring::create(view_->bytes()) : ns::Ring::open(view_->bytes()));
    }

    void close() {
        ring_.reset();
        view_.reset();
    }

    ns::Ring& ring() {
        if (!ring_) throw ns::RingError("the ring is closed");
        return *ring_;
    }

    bool put(const py::object& record) {
        return with_bytes(record, [&](auto bytes) { return ring().put(bytes); });
    }

    std::size_t put_many(const py::object& records) {
        const auto fast = py::reinterpret_steal<py::object>(
            PySequence_Fast(records.ptr(), "put_many needs a sequence of records"));
        if (!fast) throw py::error_already_set();
        ns::Ring::Batch batch(ring());
        std::size_t num_put = 0;
        const auto num_records = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
        for (; num_put < num_records; ++num_put) {
            PyObject* record = PySequence_Fast_GET_ITEM(fast.ptr(), num_put);
            if (!with_bytes(record, [&](auto bytes) { return batch.add(bytes); })) break;
        }
        if (num_put > 0) batch.publish();
        return num_put;
    }

    py::list drain(std::size_t max_records) {
        py::list records;
        ring().drain(max_records, [&](std::size_t record_bytes) {
            const auto record = py::reinterpret_steal<py::object>(
                PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(record_bytes)));
            if (!record) throw py::error_already_set();
            records.append(record);
            return reinterpret_cast<std::byte*>(PyBytes_AS_STRING(record.ptr()));
        });
        return records;
    }

  private:
    std::optional<BufferView> view_;  // keeps the memory mapped; released after ring_
    std::optional<ns::Ring> ring_;
};

void raise_typed(const char* name, const std::exception& error) {
    py::set_error(py::module_::import("nodeserve.errors").attr(name), error.what());
}

void translate(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const ns::RecordTooLarge& error) {
        raise_typed("RecordTooLarge", error);
    } catch (const ns::RingError& error) {
        raise_typed("RingError", error);
    }
}

}  // namespace

void bind_ring(py::module_& module) {
    py::register_local_exception_translator(translate);
    module.attr("RING_HEADER_BYTES") = sizeof(ns::Header);
    py::class_<PyRing>(module, "Ring", "One end of a single-producer single-consumer byte ring.")
        .def(py::init<const py::object&, bool>(), py::arg("buffer"), py::arg("create"))
        .def("close", &PyRing::close)
        .def_property_readonly("capacity", [](PyRing& self) { return self.ring().capacity(); })
        .def_property_readonly("max_record_bytes",
                               [](PyRing& self) { return self.ring().max_record_bytes(); })
        .def_property_readonly("pending_bytes",
                               [](PyRing& self) { return self.ring().pending_bytes(); })
        .def_property_readonly(
            "free_bytes",
            [](PyRing& self) { return self.ring().capacity() - self.ring().pending_bytes(); })
        .def("put", &PyRing::put, py::arg("record"))
        .def("put_many", &PyRing::put_many, py::arg("records"))
        .def("drain", &PyRing::drain,
             py::arg("max_records") = std::numeric_limits<std::size_t>::max())
        .def("arm_consumer", [](PyRing& self) { return self.ring().arm_consumer(); })
        .def("disarm_consumer", [](PyRing& self) { self.ring().disarm_consumer(); })
        .def("consumer_to_wake", [](PyRing& self) { return self.ring().consumer_to_wake(); })
        .def(
            "arm_producer",
            [](PyRing& self, std::size_t record_bytes) {
                return self.ring().arm_producer(record_bytes);
            },
            py::arg("record_bytes"))
        .def("disarm_producer", [](PyRing& self) { self.ring().disarm_producer(); })
        .def("producer_to_wake", [](PyRing& self) { return self.ring().producer_to_wake(); })
        .def("beat", [](PyRing& self) { self.ring().beat(); })
        .def_property_readonly("beats", [](PyRing& self) { return self.ring().beats(); });
}
