"""torch.distributed's collectives on one tensor a rank, by the names that this torch has for them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the first name is torch 2.13's
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
