// 16-bit floats one at a time, for machines without instructions for them.
#pragma once

#include <cstdint>
#include <cstring>

namespace nodeserve::cpu {

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint16_t bf16_from(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float fp16_to(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest < 0x0400u) {
        const float tiny = static_cast<float>(rest) * 0x1p-24f;
        return float_of(sign | bits_of(tiny));
    }
    return float_of(sign | ((rest << 13) + (112u << 23)));
}

// Rounds to nearest, ties to even.
static inline uint16_t fp16_from(float x) {
    const uint32_t bits = bits_of(x), rest = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (rest < 0x38800000u) {  // becomes a denormal: let the adder round
        const float shifted = float_of(rest) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

}  // namespace nodeserve::cpu
