#include "cpu/pack.h"

#include <cstring>

#include "cpu/scalar.h"

namespace nodeserve::cpu {

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }
int64_t depth_of(Dtype dtype) { return dtype == Dtype::BF16 ? 2 : 1; }

int64_t num_panels(int64_t n, Epilogue epilogue) {
    if (epilogue == Epilogue::SILU_MUL) return (n / 2 + kLanes - 1) / kLanes;
    return (n + kPanel - 1) / kPanel;
}

int64_t quantised_bytes(Storage storage, int64_t n, int64_t k, Epilogue epilogue) {
    return num_panels(n, epilogue) * (k / kScaled) * group_bytes(storage);
}

int64_t packed_bytes(Dtype dtype, int64_t n, int64_t k, Epilogue epilogue) {
    const int64_t depth = depth_of(dtype), steps = (k + depth - 1) / depth;
    return num_panels(n, epilogue) * steps * kPanel * depth * element_bytes(dtype);
}

namespace {

// The row of the weight behind a packed column, or -1 for padding.
template <class Params>
int64_t source_row(const Params& p, int64_t column) {
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

void put_scale(char* to, float scale, Storage storage) {
    if (storage == Storage::Q4_F32) std::memcpy(to, &scale, sizeof scale);
    else {
        const uint16_t half = fp16_from(scale);
        std::memcpy(to, &half, sizeof half);
    }
}

// The integers of the steps that share a word, `stride` bytes apart.
uint32_t word_of_4_bits(const uint8_t* from, int64_t stride) {
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) {
        word |= (from[2 * j * stride] & 15u) << 4 * j;
        word |= (from[(2 * j + 1) * stride] & 15u) << (16 + 4 * j);
    }
    return word;
}

uint32_t word_of_8_bits(const uint8_t* from, int64_t stride) {
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) word |= (from[j * stride] ^ 0x80u) << 8 * j;
    return word;
}

// One column's integers of one group.
template <int kDepth>
void put_integers(Storage storage, const uint8_t* from, char* group, int64_t column) {
    const bool bytes = storage == Storage::Q8;
    const int steps = bytes ? 4 : 8;
    for (int i = 0; i < kScaled / kDepth / steps; ++i, from += steps * kDepth)
        for (int half = 0; half < kDepth; ++half) {
            const uint32_t word =
                bytes ? word_of_8_bits(from + half, kDepth) : word_of_4_bits(from + half, kDepth);
            std::memcpy(group + ((i * kPanel + column) * kDepth + half) * 4, &word, sizeof word);
        }
}

// One group of a panel: 32 columns by 32 of k.
void pack_group(const PackQuantisedParams& p, int64_t panel, int64_t group, char* out) {
    const int64_t groups = p.k / kScaled, scale_bytes = p.storage == Storage::Q4_F32 ? 4 : 2;
    char* const scales = out + kPanel * kScaled / (p.storage == Storage::Q8 ? 1 : 2);
    std::memset(out, 0, static_cast<size_t>(group_bytes(p.storage)));
    for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t row = source_row(p, panel * kPanel + c);
        if (row < 0) continue;
        const uint8_t* const q = p.q + row * p.k + group * kScaled;
        if (p.dtype == Dtype::BF16) put_integers<2>(p.storage, q, out, c);
        else put_integers<1>(p.storage, q, out, c);
        put_scale(scales + c * scale_bytes, p.scale[row * groups + group], p.storage);
        if (p.low) put_scale(scales + (kPanel + c) * scale_bytes, p.low[row * groups + group], p.storage);
    }
}

}  // namespace

void pack_quantised_panels(const PackQuantisedParams& params, int64_t first_panel, int64_t last_panel) {
    const int64_t groups = params.k / kScaled, size = group_bytes(params.storage);
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
        for (int64_t group = 0; group < groups; ++group)
            pack_group(params, panel, group, params.out + (panel * groups + group) * size);
}

void pack_panels(const PackParams& params, int64_t first_panel, int64_t last_panel) {
    if (params.dtype == Dtype::BF16) pack_of<uint16_t, 2>(params, first_panel, last_panel);
    else if (params.dtype == Dtype::F32) pack_of<uint32_t, 1>(params, first_panel, last_panel);
    else pack_of<uint16_t, 1>(params, first_panel, last_panel);
}

}  // namespace nodeserve::cpu
