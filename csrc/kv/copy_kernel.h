// Starting the copy kernel of copy_kernel.cu.
#pragma once

#include <cuda_runtime.h>

#include "kv/copy_params.h"

namespace nodeserve::kv {

void launch_copy(const SmallCopy& params, unsigned num_thread_blocks, cudaStream_t stream);
void launch_copy(const LargeCopy& params, unsigned num_thread_blocks, cudaStream_t stream);

}  // namespace nodeserve::kv
