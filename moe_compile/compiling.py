"""`moe_compile.compile`: torch.compile with our backend, and with the capture flags that naive MoE loops need."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import _optimize as _torch_optimize

from moe_compile.backend import Backend
from moe_compile.capture import WithCaptureFlags
from moe_compile.config import ParallelConfig
from moe_compile.logs import warn_once
from moe_compile.options import Options, split_report
from moe_compile.report import RewriteReport


def compile(
    model: Any = None,
    *,
    inner: str | Callable[..., Any] = "inductor",
    parallel: ParallelConfig | None = None,
    validate: str = "auto",
    quant: str = "none",
    report: RewriteReport | None = None,
    probe: bool | None = None,
    **torch_compile_kwargs: Any,
) -> Any:
    """Compile a module or a function, with its MoE blocks rewritten into stage ops.

    model: nn.Module (gives the OptimizedModule that torch.compile gives) or function; without it, a decorator.
    inner: what compiles the rewritten graphs: "inductor", another Dynamo backend's name, or a callable.
    parallel, validate, quant: see ParallelConfig and Options.
    report: filled with what becomes of each graph, as it is compiled.
    probe: blocks that Dynamo cannot capture (`for e in hit.nonzero()`, `if n == 0: continue`, counts through numpy) are recorded,
        checked and captured from the recording. Before the first call a copy of the model, which shares its parameters, is called
        once to find them. So are blocks with long loops whose class comes again and again: Dynamo then traces one call for each layer,
        and the block is rewritten once. By default (None) for modules that are not split over ranks. `moe_compile.restore` undoes it.
    torch_compile_kwargs: torch.compile's fullgraph, dynamic, mode, options, disable and the like; `options` also takes
        this function's keywords (where one is given here with another value than its default, it wins).

    Dynamo's two capture flags are on while this model is compiled and only then; a frame that raises with them is
    compiled without. Raises ValueError or TypeError for options that cannot be meant, and what torch.compile raises.
    """
    settings: dict[str, Any] = {"inner": inner, "parallel": parallel, "validate": validate, "quant": quant}
    if model is None:
        return functools.partial(compile, **settings, report=report, probe=probe, **torch_compile_kwargs)
    _check_kwargs(torch_compile_kwargs)
    options, listed = split_report(torch_compile_kwargs.pop("options", None))
    if "guard_filter_fn" in options:  # torch.compile takes this one out as well
        torch_compile_kwargs["guard_filter_fn"] = options.pop("guard_filter_fn")
    typed = {key: value for key, value in settings.items() if value != _DEFAULTS[key]}
    parsed = Options.parse(torch_compile_kwargs.pop("mode", None), options, **typed)
    report = listed if report is None else report
    compiled = optimize(model, Backend(parsed, report), **torch_compile_kwargs)
    if probe or (probe is None and parallel is None and isinstance(model, torch.nn.Module) and not torch_compile_kwargs.get("disable")):
        return _probed(model, compiled, report)
    return compiled


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(compile).parameters.items()}


def optimize(model: Any, backend: Backend, *, capture_flags: bool = True, **kwargs: Any) -> Any:
    """torch.compile(model, backend=backend, **kwargs), with the capture flags for this model's compilations."""
    _prepare_quantised(model, backend.report)
    kwargs["nopython"] = kwargs.pop("fullgraph", False)
    context = torch._dynamo.optimize(backend, **kwargs)
    # fullgraph sets the flags by itself, and has nothing to fall back to. A disabled context has no callback.
    if capture_flags and not kwargs["nopython"] and callable(getattr(context, "callback", None)):
        parallel = backend.options.parallel
        context.callback = WithCaptureFlags(context.callback, backend.report, over_ranks=parallel is not None and parallel.ep > 1)
    return context(model)


def _probed(model: Any, compiled: Any, report: RewriteReport | None) -> Any:
    """The compiled module, whose first call finds what to record."""
    from moe_compile.probing import probe_first_call

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"moe_compile.compile(probe=True) takes an nn.Module, not {model!r}: the blocks are found among its modules")
    compiled.forward = probe_first_call(model, compiled.forward, report)
    return compiled


def _prepare_quantised(model: Any, report: RewriteReport | None) -> None:
    """Prepare quantised blocks of other libraries (`moe_compile.integrations`), and say which could not be."""
    if "transformers" not in sys.modules:
        return
    from moe_compile import integrations

    for reason in integrations.prepare(model):
        warn_once(reason)
        if report is not None:
            report.notes.append(reason)


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    if "backend" in kwargs:
        raise TypeError("moe_compile.compile() is the backend; name the compiler behind it with `inner`")
    allowed = {"fullgraph", "mode", "options", *inspect.signature(_torch_optimize).parameters}
    allowed &= set(inspect.signature(torch.compile).parameters)
    unknown = sorted(kwargs.keys() - allowed)
    if unknown:
        raise TypeError(
            f"moe_compile.compile() got unexpected keywords {', '.join(unknown)}; it takes inner, parallel, validate, "
            f"report, and torch.compile's {', '.join(sorted(allowed))}"
        )
