// The module `_cuda` over the fake runtime: what csrc/kv/bind.cpp binds, and `fake` for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kv/bind.cpp"  // not on its own: most of the time to compile either file goes into pybind11
#include "runtime.h"

namespace {

// Looks into the runtime, or changes it, under its lock.
template <class Use>
auto locked(Use&& use) {
    auto& rt = fake_cuda::runtime();
    std::unique_lock held(rt.lock);
    return use(rt, held);
}

void fail(const std::string& function, int call, int number) {
    locked([&](auto& rt, auto&) { rt.failures[function] = {call, number}; });
}

void fill(std::uintptr_t stream, std::uintptr_t address, int value, std::size_t num_bytes) {
    if (cudaMemsetAsync(reinterpret_cast<void*>(address), value, num_bytes, reinterpret_cast<cudaStream_t>(stream)))
        throw std::invalid_argument("fill: no such memory or stream");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    bind_kv(module);
    py::module_ fake = module.def_submodule("fake");
    fake.def("reload_environment", [] {
        locked([](auto& rt, auto& held) {
            rt.drain(held);
            rt.configure();
        });
    });
    fake.def("fail", &fail, py::arg("function"), py::arg("call") = 1, py::arg("number") = 1);
    fake.def("fill", &fill, py::arg("stream"), py::arg("address"), py::arg("value"), py::arg("num_bytes"));
    fake.def("calls", [](const std::string& function) {
        return locked([&](auto& rt, auto&) { return rt.calls[function]; });
    });
    fake.def("last_batch", [] { return locked([](auto& rt, auto&) { return rt.last_batch; }); });
    fake.def("current_device", [] { return fake_cuda::current_device; });
    fake.def("last_grid", [] { return locked([](auto& rt, auto&) { return rt.last_grid; }); });
    fake.def("num_pending", [] { return locked([](auto& rt, auto&) { return rt.num_pending(); }); });
    fake.def("num_allocations", [] { return locked([](auto& rt, auto&) { return rt.allocations.size(); }); });
}
