// Copies of pages on the caller's stream: one kernel launch or one batched copy call a request.
#pragma once

#include "kv/copy_request.h"
#include "kv/stream.h"

namespace nodeserve::kv {

// KERNEL reads and writes with a few thread blocks, BATCH leaves it to the copy engines. AUTO takes
// BATCH for whole blocks, which are few and long, from or to another device or the host; KERNEL for
// the many short runs of unequal shards, where a copy engine would pay for each, and within one
// device, where others have seen the engines at a twentieth of what a kernel moves. To be revised by
// measurement.
enum class Method { AUTO, KERNEL, BATCH };

// Puts the copies on the stream and returns how many launches (or batch calls) that took: 0 for an
// empty request; 1 up to some 4,000 pairs with one run; then more. Of the kernel, at most
// max_thread_blocks run at a time; 0 stands for a quarter of the device's multiprocessors, or half of
// them where both sides are in its own memory.
int copy_pages(const CopyRequest& request, StreamHandle stream, Method method, int max_thread_blocks);

}  // namespace nodeserve::kv
