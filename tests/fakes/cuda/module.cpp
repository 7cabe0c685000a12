// The module `_cuda` over the fake runtime: what csrc/kv/bind.cpp binds, and `fake` for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kv/bind.cpp"  // not on its own: most of the time to compile either file goes into pybind11
#include "runtime.h"

namespace {

void fail(const std::string& function, int call, int number) {
    auto& rt = fake_cuda::runtime();
    const std::scoped_lock held(rt.lock);
    rt.failures[function] = {call, number};
}

int calls(const std::string& function) {
    auto& rt = fake_cuda::runtime();
    const std::scoped_lock held(rt.lock);
    return rt.calls[function];
}

void fill(std::uintptr_t stream, std::uintptr_t address, int value, std::size_t num_bytes) {
    if (cudaMemsetAsync(reinterpret_cast<void*>(address), value, num_bytes, reinterpret_cast<cudaStream_t>(stream)))
        throw std::invalid_argument("fill: no such memory or stream");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    bind_kv(module);
    py::module_ fake = module.def_submodule("fake");
    fake.def("fail", &fail, py::arg("function"), py::arg("call") = 1, py::arg("number") = 1);
    fake.def("calls", &calls, py::arg("function"));
    fake.def("fill", &fill, py::arg("stream"), py::arg("address"), py::arg("value"), py::arg("num_bytes"));
    fake.def("last_batch", [] {
        auto& rt = fake_cuda::runtime();
        const std::scoped_lock held(rt.lock);
        return rt.last_batch;
    });
    fake.def("num_pending", [] {
        auto& rt = fake_cuda::runtime();
        const std::scoped_lock held(rt.lock);
        return rt.num_pending();
    });
    fake.def("num_allocations", [] {
        auto& rt = fake_cuda::runtime();
        const std::scoped_lock held(rt.lock);
        return rt.allocations.size();
    });
}
