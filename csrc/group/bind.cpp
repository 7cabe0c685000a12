// nodeserve._host.Meeting: collectives over any writable buffer. This file only binds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "group/meeting.h"

namespace py = pybind11;

namespace nodeserve::group {
namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;
using Counts = std::vector<std::size_t>;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// A meeting, and the memory that it lies in kept alive.
class PyMeeting {
  public:
    PyMeeting(const py::buffer& memory, int rank, int size, double timeout_s)
        : memory_(memory.request(true)), size_(size), meeting_(checked(memory_, rank, size), rank, size, timeout_s) {}

    void all_reduce(Address x, std::size_t count) { meeting_.all_reduce(reinterpret_cast<float*>(x), count); }

    void gather(Address x, std::size_t num_bytes, Address out) {
        meeting_.gather(reinterpret_cast<const std::byte*>(x), num_bytes, reinterpret_cast<std::byte*>(out));
    }

    void all_to_all(Address x, const Counts& given, Address out, const Counts& taken) {
        require(given.size() == static_cast<std::size_t>(size_) && taken.size() == given.size(),
                "given and taken must have a number for each member");
        meeting_.all_to_all(reinterpret_cast<const std::byte*>(x), given, reinterpret_cast<std::byte*>(out), taken);
    }

  private:
    static std::span<std::byte> checked(const py::buffer_info& memory, int rank, int size) {
        require(size >= 1 && 0 <= rank && rank < size, "rank must be below size");
        require(memory.ndim == 1 && memory.strides[0] == memory.itemsize, "memory must be contiguous");
        const auto num_bytes = static_cast<std::size_t>(memory.size * memory.itemsize);
        require(num_bytes >= Meeting::memory_bytes(size, std::max<std::size_t>(kLine, 8 * size + kLine)),
                "memory must have room for two slots of each member");
        require(reinterpret_cast<Address>(memory.ptr) % kLine == 0, "memory must begin at a cache line");
        return {static_cast<std::byte*>(memory.ptr), num_bytes};
    }

    py::buffer_info memory_;
    int size_;
    Meeting meeting_;
};

}  // namespace
}  // namespace nodeserve::group

void bind_group(py::module_& module) {
    using nodeserve::group::Counts;
    using nodeserve::group::NoGil;
    using nodeserve::group::PyMeeting;
    module.def("meeting_bytes", &nodeserve::group::Meeting::memory_bytes, py::arg("size"), py::arg("slot_bytes"));
    py::class_<PyMeeting>(module, "Meeting")
        .def(py::init<const py::buffer&, int, int, double>(), py::arg("memory"), py::arg("rank"), py::arg("size"),
             py::arg("timeout_s"))
        .def("all_reduce", &PyMeeting::all_reduce, py::arg("x"), py::arg("count"), NoGil())
        .def("gather", &PyMeeting::gather, py::arg("x"), py::arg("num_bytes"), py::arg("out"), NoGil())
        .def("all_to_all", &PyMeeting::all_to_all, py::arg("x"), py::arg("given"), py::arg("out"), py::arg("taken"),
             NoGil());
}
