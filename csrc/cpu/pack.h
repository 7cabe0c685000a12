// Weights into panels: moving bytes, no arithmetic but the narrowing of scales.
#pragma once

#include <cstdint>

#include "cpu/params.h"

namespace nodeserve::cpu {

int64_t element_bytes(Dtype dtype);
int64_t depth_of(Dtype dtype);

// Panels of a weight: 32 columns, or for SILU_MUL 16 of gate and 16 of up.
int64_t num_panels(int64_t n, Epilogue epilogue);
int64_t packed_bytes(Dtype dtype, int64_t n, int64_t k, Epilogue epilogue);
int64_t quantised_bytes(Storage storage, int64_t n, int64_t k, Epilogue epilogue);

struct PackParams {
    const char* weight;  // [n, k]; for SILU_MUL gate's n / 2 rows, then up's
    char* out;           // packed_bytes()
    int64_t n, k;
    Dtype dtype;
    Epilogue epilogue;
};

void pack_panels(const PackParams& params, int64_t first_panel, int64_t last_panel);

struct PackQuantisedParams {
    const uint8_t* q;    // [n, k]: 0 to 15, or int8 for Q8; rows as in PackParams
    const float* scale;  // [n, k / 32]: float16 numbers unless Q4_F32
    const float* low;    // [n, k / 32], null for Q8
    char* out;           // quantised_bytes()
    int64_t n, k;
    Dtype dtype;
    Epilogue epilogue;
    Storage storage;
};

void pack_quantised_panels(const PackQuantisedParams& params, int64_t first_panel, int64_t last_panel);

}  // namespace nodeserve::cpu
