// Kernels for machines with AVX2 and FMA.
#include "cpu/params.h"

#if NS_X86_LEVELS
#include <cmath>
#include <cstring>
#include <utility>
#include <immintrin.h>

#include "cpu/scalar.h"

#pragma GCC target("avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a real call

#define NS_LEVEL avx2
#define NS_NAME "avx2"
#define NS_SIMD 256
#define NS_HAS_BF16 0
#define NS_TILE_VECTORS 2
#define NS_BF16_ROWS 2
#define NS_F32_ROWS 3
#define NS_BF16_LINEAR_ROWS 2
#define NS_F32_LINEAR_ROWS 3
#include "cpu/kernels.inl"
#endif
