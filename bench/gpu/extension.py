"""The CUDA extension, real or over the pretended runtime of the tests. No torch here."""

from typing import Any


def extension(rehearsal: bool) -> Any:
    """nodeserve._cuda; in a rehearsal the same sources over a pretended runtime."""
    if rehearsal:
        from tests.fakes.cuda import load_fake_cuda

        return load_fake_cuda()
    from nodeserve import _cuda

    return _cuda
