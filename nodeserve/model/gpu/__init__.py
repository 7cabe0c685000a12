"""The model on a GPU: operations, kernels and attention backends. Needs triton.

Nothing outside this package imports triton, so a machine without a GPU does not need it. The
kernels are Triton's and run on CPU tensors too, through its interpreter: `TRITON_INTERPRET=1`
before the first import.
"""
