// nodeserve._host: what needs no GPU. This file only binds; each folder has its own bind.cpp.
#include <pybind11/pybind11.h>

void bind_ring(pybind11::module_& module);
void bind_cpu(pybind11::module_& module);
void bind_group(pybind11::module_& module);

PYBIND11_MODULE(_host, module) {
    module.doc() = "Shared-memory rings, collectives and CPU kernels of nodeserve.";
    bind_ring(module);
    bind_cpu(module);
    bind_group(module);
}
