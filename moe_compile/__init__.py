"""moe_compile: a compiler for Mixture-of-Experts layers that people wrote the plain way.

    torch.compile(model, backend="moe_compile")     # the backend by its name
    moe_compile.compile(model)                      # the same, and captures data-dependent MoE loops too
    print(moe_compile.explain(model)(*inputs))      # what was found, what was rewritten, and why not the rest

Names are resolved on first use: importing this package imports neither torch nor anything of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compile import testing as testing
    from moe_compile.calibration import calibrate as calibrate
    from moe_compile.checkpoint import gather_state_dict as gather_state_dict
    from moe_compile.checkpoint import load_sharded as load_sharded
    from moe_compile.checkpoint import save_sharded as save_sharded
    from moe_compile.compiling import compile as compile
    from moe_compile.config import ParallelConfig as ParallelConfig
    from moe_compile.errors import ParallelError as ParallelError
    from moe_compile.explaining import explain as explain
    from moe_compile.gradients import clip_grad_norm_ as clip_grad_norm_
    from moe_compile.gradients import ddp as ddp
    from moe_compile.gradients import ignored_parameters as ignored_parameters
    from moe_compile.marking import moe as moe
    from moe_compile.ops.comm.exchange import ExchangeError as ExchangeError
    from moe_compile.ops.comm.exchange import check_all as check_exchanges
    from moe_compile.ops.comm.exchange import destroy_all as destroy_exchanges
    from moe_compile.probing import restore as restore
    from moe_compile.report import RewriteReport as RewriteReport
    from moe_compile.rewriting import rewrite as rewrite
    from moe_compile.sharding import expert_parameters as expert_parameters
    from moe_compile.sharding import is_sharded as is_sharded
    from moe_compile.sharding import shard_experts as shard_experts

__version__ = "0.1.0"

_HOMES = {
    "compile": "moe_compile.compiling",
    "explain": "moe_compile.explaining",
    "moe": "moe_compile.marking",
    "restore": "moe_compile.probing",
    "rewrite": "moe_compile.rewriting",
    "ParallelConfig": "moe_compile.config",
    "RewriteReport": "moe_compile.report",
    "ParallelError": "moe_compile.errors",
    "ExchangeError": "moe_compile.ops.comm.exchange",
    "calibrate": "moe_compile.calibration",
    "shard_experts": "moe_compile.sharding",
    "is_sharded": "moe_compile.sharding",
    "expert_parameters": "moe_compile.sharding",
    "ddp": "moe_compile.gradients",
    "clip_grad_norm_": "moe_compile.gradients",
    "ignored_parameters": "moe_compile.gradients",
    "load_sharded": "moe_compile.checkpoint",
    "save_sharded": "moe_compile.checkpoint",
    "gather_state_dict": "moe_compile.checkpoint",
}
_OTHER_NAMES = {
    "check_exchanges": ("moe_compile.ops.comm.exchange", "check_all"),
    "destroy_exchanges": ("moe_compile.ops.comm.exchange", "destroy_all"),
}
_MODULES = ("testing",)

__all__ = [
    "ExchangeError",
    "ParallelConfig",
    "ParallelError",
    "RewriteReport",
    "calibrate",
    "check_exchanges",
    "clip_grad_norm_",
    "compile",
    "ddp",
    "destroy_exchanges",
    "expert_parameters",
    "explain",
    "gather_state_dict",
    "ignored_parameters",
    "is_sharded",
    "load_sharded",
    "moe",
    "restore",
    "rewrite",
    "save_sharded",
    "shard_experts",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _OTHER_NAMES:
        home, its_name = _OTHER_NAMES[name]
        value = getattr(importlib.import_module(home), its_name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
