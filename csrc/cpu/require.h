// The edge's checks: a bad argument becomes Python's ValueError, its message starts with the name.
#pragma once

#include <stdexcept>
#include <string>

namespace nodeserve::cpu {

static inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

static inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace nodeserve::cpu
