"""The forward pass: architectures, the operations they are written in, and the KV pages.

How a worker uses it:

    ops = backend.make_ops(config, torch.bfloat16, num_threads=1)
    layout = kv.layout_of(config, block_size=16, dtype=torch.bfloat16)
    pool = ...  # writable buffer of num_blocks * layout.block_bytes, all zero (shared memory)
    cache = ops.cache(layout, pool)
    model = families.build(config, weights, ops, progress)  # weights("model.norm.weight") -> Tensor
    logits = model.forward(StepInputs(...), cache)  # [num_logits, vocab_size] float32

The logits live in a buffer that the next forward overwrites. One model and its ops belong to one
thread. A block of the pool is one contiguous run of `layout.block_bytes`. A handoff copies runs of
bytes between such blocks (policy/copy_plan.py), so both ends must use the same ops class. The pool
must not be closed before the cache is dropped.

On a GPU the operations are `gpu.ops.CudaOps(dtype, device, attention)`, the pool is a uint8 tensor
of device memory with blocks in the order [layer, K or V, KV head, token, head_dim], and a captured
step needs `model.reserve(...)` first. gpu/step.py says what a graph may rely on.

A token's logits do not depend, to the bit, on what shares its step, on where its prompt was cut
into chunks, or on the number of threads (native ops; `csrc/cpu/params.h` says why).
"""
