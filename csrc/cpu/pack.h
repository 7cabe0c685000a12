// Weights into panels: moving bytes, no arithmetic.
#pragma once

#include <cstdint>

#include "cpu/params.h"

namespace nodeserve::cpu {

int64_t element_bytes(Dtype dtype);
int64_t depth_of(Dtype dtype);

// Panels of a weight: 32 columns, or for SILU_MUL 16 of gate and 16 of up.
int64_t num_panels(int64_t n, Epilogue epilogue);
int64_t packed_bytes(Dtype dtype, int64_t n, int64_t k, Epilogue epilogue);

struct PackParams {
    const char* weight;  // [n, k]; for SILU_MUL gate's n / 2 rows, then up's
    char* out;           // packed_bytes()
    int64_t n, k;
    Dtype dtype;
    Epilogue epilogue;
};

void pack_panels(const PackParams& params, int64_t first_panel, int64_t last_panel);

}  // namespace nodeserve::cpu
