// Kernels for machines with anything else: the compiler's own vectors.

#include <cmath>
#include <cstring>
#include <utility>
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "cpu/params.h"
#include "cpu/scalar.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a real call

#define NS_LEVEL generic
#define NS_NAME "generic"
#define NS_SIMD 128
#define NS_HAS_BF16 0
#define NS_TILE_VECTORS 2
#define NS_BF16_ROWS 2
#define NS_F32_ROWS 2
#define NS_BF16_LINEAR_ROWS 2
#define NS_F32_LINEAR_ROWS 2
#include "cpu/kernels.inl"

