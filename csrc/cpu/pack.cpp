#include "cpu/pack.h"

#include <cstring>

namespace nodeserve::cpu {

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }
int64_t depth_of(Dtype dtype) { return dtype == Dtype::BF16 ? 2 : 1; }

int64_t num_panels(int64_t n, Epilogue epilogue) {
    if (epilogue == Epilogue::SILU_MUL) return (n / 2 + kLanes - 1) / kLanes;
    return (n + kPanel - 1) / kPanel;
}

int64_t packed_bytes(Dtype dtype, int64_t n, int64_t k, Epilogue epilogue) {
    const int64_t depth = depth_of(dtype), steps = (k + depth - 1) / depth;
    return num_panels(n, epilogue) * steps * kPanel * depth * element_bytes(dtype);
}

namespace {

// The row of the weight behind a packed column, or -1 for padding.
int64_t source_row(const PackParams& p, int64_t column) {
    if (p.epilogue != Epilogue::SILU_MUL) return column < p.n ? column : -1;
    const int64_t width = p.n / 2, lane = column % kPanel;
    const int64_t row = column / kPanel * kLanes + lane % kLanes;
    if (row >= width) return -1;
    return lane < kLanes ? row : width + row;
}

template <class Element, int kDepth>
void pack_of(const PackParams& p, int64_t first_panel, int64_t last_panel) {
    const int64_t steps = (p.k + kDepth - 1) / kDepth, whole = p.k / kDepth;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        Element* const out = reinterpret_cast<Element*>(p.out) + panel * steps * kPanel * kDepth;
        for (int64_t c = 0; c < kPanel; ++c) {
            const int64_t row = source_row(p, panel * kPanel + c);
            Element* to = out + c * kDepth;
            if (row < 0) {
                for (int64_t s = 0; s < steps; ++s, to += kPanel * kDepth)
                    std::memset(to, 0, sizeof(Element) * kDepth);
                continue;
            }
            const Element* from = reinterpret_cast<const Element*>(p.weight) + row * p.k;
            for (int64_t s = 0; s < whole; ++s, to += kPanel * kDepth, from += kDepth)
                std::memcpy(to, from, sizeof(Element) * kDepth);
            if (whole == steps) continue;
            to[0] = from[0];
            to[kDepth - 1] = 0;
        }
    }
}

}  // namespace

void pack_panels(const PackParams& params, int64_t first_panel, int64_t last_panel) {
    if (params.dtype == Dtype::BF16) pack_of<uint16_t, 2>(params, first_panel, last_panel);
    else if (params.dtype == Dtype::F32) pack_of<uint32_t, 1>(params, first_panel, last_panel);
    else pack_of<uint16_t, 1>(params, first_panel, last_panel);
}

}  // namespace nodeserve::cpu
