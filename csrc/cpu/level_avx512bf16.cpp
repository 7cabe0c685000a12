// Kernels for machines with AVX-512 and its bfloat16 dot product.
#include "cpu/params.h"

#if NS_X86_LEVELS
#include <cmath>
#include <cstring>
#include <utility>
#include <immintrin.h>

#include "cpu/scalar.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a real call
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"

#define NS_LEVEL avx512bf16
#define NS_NAME "avx512_bf16"
#define NS_SIMD 512
#define NS_HAS_BF16 1
#define NS_TILE_VECTORS 4
#define NS_BF16_ROWS 6
#define NS_F32_ROWS 6
#define NS_BF16_LINEAR_ROWS 12
#define NS_F32_LINEAR_ROWS 12
#include "cpu/kernels.inl"
#endif
