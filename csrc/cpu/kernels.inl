// The kernels of one instruction set. A level_*.cpp sets the compiler's target, defines NS_LEVEL
// (a namespace, so that the linker never mixes two levels), NS_SIMD and the tile sizes, and
// includes this. Nothing here may instantiate a standard template that another file also uses: the
// linker would keep one copy, maybe one that this machine cannot run.
#include "cpu/params.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace nodeserve::cpu::NS_LEVEL {
namespace {

#if NS_SIMD == 512
#include "cpu/simd512.inl"
#elif NS_SIMD == 256
#include "cpu/simd256.inl"
#else
#include "cpu/simd128.inl"
#endif
#include "cpu/numeric.inl"
#include "cpu/linear.inl"
#include "cpu/pointwise.inl"
#include "cpu/store.inl"
#include "cpu/attention.inl"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {NS_NAME, linear, quantised_rows, rms_norm, embed, store, attend, read};

}  // namespace nodeserve::cpu::NS_LEVEL
