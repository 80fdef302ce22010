"""What the backend was asked to do, whichever way it was asked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_compile.config import QUANT, ParallelConfig

VALIDATE = ("auto", "always", "off")


@dataclasses.dataclass(frozen=True)
class Options:
    """The backend's options: what ``torch.compile(options={...})`` and ``moe_compile.compile(...)`` both become.

    inner: the compiler that gets the rewritten graph: "inductor", the name of another Dynamo backend, or a callable.
    inner_options: the inner compiler's own options (for Inductor its configuration keys).
    mode: torch.compile's mode, for the inner compiler.
    parallel: how the model is parallel; None is one process.
    validate: when a rewrite is executed against the original: "auto", "always" or "off".
    quant: "fp8" computes the experts of rewritten blocks in e4m3 in inference: weights are quantised when the graph is compiled, rows in
        the kernels, and over ranks before they travel (that alone is ParallelConfig.quant).

    Raises ValueError or TypeError for a value that cannot be meant.
    """

    inner: str | Callable[..., Any] = "inductor"
    inner_options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    mode: str | None = None
    parallel: ParallelConfig | None = None
    validate: str = "auto"
    quant: str = "none"

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        _check_choice("validate", self.validate, VALIDATE)
        _check_choice("quant", self.quant, QUANT)
        _check_parallel(self.parallel)
        if self.inner == "inductor":
            _check_inductor_keys(self.inner_options)

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None, **typed: Any) -> Options:
        """Options from torch.compile's mode and flat options dictionary, and from keywords (which win).

        A key is a field of this class or one of Inductor's configuration keys ("max_autotune", "triton.cudagraphs").
        For another inner compiler its options go into the "inner_options" dictionary. Unknown keys are a ValueError
        that names the nearest known ones.
        """
        given = {key.replace("-", "_"): value for key, value in (options or {}).items()}
        own = {key: given.pop(key) for key in list(given) if key in _FIELDS}
        own.update(typed)
        own["mode"] = mode if mode is not None else own.get("mode")
        if given and own.get("inner", "inductor") != "inductor":
            raise ValueError(_unknown(given, _FIELDS, 'options of another inner compiler go into "inner_options"'))
        own["inner_options"] = {**(own.get("inner_options") or {}), **given}
        return cls(**own)


_FIELDS = tuple(field.name for field in dataclasses.fields(Options))


def split_report(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], Any]:
    """torch.compile's options without the key "report", and what stood there: the RewriteReport to fill, or None."""
    rest = dict(options or {})
    report = rest.pop("report", None)
    return rest, report


def _check_inner(inner: Any) -> None:
    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(f"inner is {inner!r}; give a Dynamo backend's name or a callable (graph module, inputs) -> callable")
    if inner == "moe_compile":
        raise ValueError('inner="moe_compile" would call itself; name the compiler behind it, for example "inductor"')


def _check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _check_parallel(parallel: Any) -> None:
    if parallel is None:
        return
    if not isinstance(parallel, ParallelConfig):
        raise TypeError(f"parallel is {type(parallel).__name__}; give a moe_compile.ParallelConfig or None")


def _check_inductor_keys(options: Mapping[str, Any]) -> None:
    known = _inductor_keys() if options else frozenset()
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(_unknown(unknown, [*_FIELDS, *known], "`torch._inductor.list_options()` lists Inductor's"))


@functools.cache
def _inductor_keys() -> frozenset[str]:
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def _unknown(keys: Iterable[str], known: Iterable[str], hint: str) -> str:
    known = list(known)
    parts = []
    for key in keys:
        near = difflib.get_close_matches(key, known, n=3)
        parts.append(f"unknown option {key!r}" + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""))
    return f"{'; '.join(parts)}. moe_compile's own options: {', '.join(_FIELDS)}; {hint}"
