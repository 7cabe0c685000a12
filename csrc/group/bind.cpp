// nodeserve._host.Meeting and Pipe: collectives and messages over any writable buffer. This file only binds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "group/meeting.h"
#include "group/pipe.h"

namespace py = pybind11;

namespace nodeserve::group {
namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;
using Counts = std::vector<std::size_t>;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

std::span<std::byte> bytes_of(const py::buffer_info& memory) {
    require(memory.ndim == 1 && memory.strides[0] == memory.itemsize, "memory must be contiguous");
    require(reinterpret_cast<Address>(memory.ptr) % kLine == 0, "memory must begin at a cache line");
    return {static_cast<std::byte*>(memory.ptr), static_cast<std::size_t>(memory.size * memory.itemsize)};
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
        const std::span<std::byte> bytes = bytes_of(memory);
        require(bytes.size() >= Meeting::memory_bytes(size, std::max<std::size_t>(kLine, 8 * size + kLine)),
                "memory must have room for two slots of each member");
        return bytes;
    }

    py::buffer_info memory_;
    int size_;
    Meeting meeting_;
};

// The same of one end of a pipe.
class PyPipe {
  public:
    PyPipe(const py::buffer& memory, double timeout_s)
        : memory_(memory.request(true)), pipe_(checked(memory_), timeout_s) {}

    void send(Address x, std::size_t num_bytes) { pipe_.send(reinterpret_cast<const std::byte*>(x), num_bytes); }

    void receive(Address out, std::size_t num_bytes) { pipe_.receive(reinterpret_cast<std::byte*>(out), num_bytes); }

  private:
    static std::span<std::byte> checked(const py::buffer_info& memory) {
        const std::span<std::byte> bytes = bytes_of(memory);
        require(bytes.size() >= Pipe::memory_bytes(2 * kLine) && bytes.size() <= Pipe::memory_bytes(Pipe::kMaxRoom),
                "memory must have room for two lines of 64 bytes, and for 2^30 at most");
        return bytes;
    }

    py::buffer_info memory_;
    Pipe pipe_;
};

}  // namespace
}  // namespace nodeserve::group

void bind_group(py::module_& module) {
    using nodeserve::group::Counts;
    using nodeserve::group::NoGil;
    using nodeserve::group::PyMeeting;
    using nodeserve::group::PyPipe;
    module.def("meeting_bytes", &nodeserve::group::Meeting::memory_bytes, py::arg("size"), py::arg("slot_bytes"));
    py::class_<PyMeeting>(module, "Meeting")
        .def(py::init<const py::buffer&, int, int, double>(), py::arg("memory"), py::arg("rank"), py::arg("size"),
             py::arg("timeout_s"))
        .def("all_reduce", &PyMeeting::all_reduce, py::arg("x"), py::arg("count"), NoGil())
        .def("gather", &PyMeeting::gather, py::arg("x"), py::arg("num_bytes"), py::arg("out"), NoGil())
        .def("all_to_all", &PyMeeting::all_to_all, py::arg("x"), py::arg("given"), py::arg("out"), py::arg("taken"),
             NoGil());
    module.def("pipe_bytes", &nodeserve::group::Pipe::memory_bytes, py::arg("room_bytes"));
    py::class_<PyPipe>(module, "Pipe")
        .def(py::init<const py::buffer&, double>(), py::arg("memory"), py::arg("timeout_s"))
        .def("send", &PyPipe::send, py::arg("x"), py::arg("num_bytes"), NoGil())
        .def("receive", &PyPipe::receive, py::arg("out"), py::arg("num_bytes"), NoGil());
}
