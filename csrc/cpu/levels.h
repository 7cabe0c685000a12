// Which instruction sets this machine can run, best first.
#pragma once

#include <string>
#include <vector>

#include "cpu/params.h"

namespace nodeserve::cpu {

std::vector<const Kernels*> available_kernels();

// The level of that name, or the best for an empty name. Throws for one this machine cannot run.
const Kernels& kernels_named(const std::string& name);

}  // namespace nodeserve::cpu
