#include "cpu/levels.h"

#include <stdexcept>

namespace nodeserve::cpu {

#if NS_X86_LEVELS
namespace avx512bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace generic { extern const Kernels kernels; }

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
#if NS_X86_LEVELS
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kernels);
    if (avx512) found.push_back(&avx512::kernels);
    // Every machine with AVX2 has F16C; the compiler's list of names lacks it before GCC 13.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
    found.push_back(&generic::kernels);
    return found;
}

const Kernels& kernels_named(const std::string& name) {
    std::string names;
    for (const Kernels* kernels : available_kernels()) {
        if (name.empty() || name == kernels->name) return *kernels;
        names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
    }
    throw std::invalid_argument("isa must be one of " + names + ", got '" + name + "'");
}

}  // namespace nodeserve::cpu
