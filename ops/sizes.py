"""Extents that only the data tells, in fakes."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def dynamic_size(like: Any) -> Any:
    """A new extent of at least 0. `like`: a fake tensor of the call.

    As torch.library.get_ctx().new_dynamic_size(), but also in graphs that Dynamo captured without sizes from the data: ours are put
    there afterwards.
    """
    if not isinstance(like, FakeTensor) or like.fake_mode.shape_env is None:
        raise RuntimeError("a size that only the data tells needs a fake tensor of a mode with a shape environment")
    size = like.fake_mode.shape_env.create_unbacked_symint()
    torch._check_is_size(size)
    return size
