// nodeserve._cuda: what is made for GPUs, without torch.
#include <pybind11/pybind11.h>

void bind_kv(pybind11::module_& module);

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Page pools, streams, events and page copies on CUDA devices";
    bind_kv(module);
}
