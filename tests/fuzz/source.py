"""A spec as the source of a Python file with a class `Block`, and that file as modules."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from fuzz.experts import LISTS, classes, experts_init, methods
from fuzz.loops import loop_lines
from fuzz.mistakes import CLASS, DECIDED, GLOBALS, INIT, RESULT, ROUTING, SETTINGS
from fuzz.routers import router_init, router_lines
from fuzz.spec import H, Spec, indented
from fuzz.styles import DENSE, GATHERED, style_lines

EXTRA_INIT = {
    "shared": ["self.shared = nn.Linear(H, H)"],
    "shared_gated": ["self.shared, self.shared_gate = nn.Linear(H, H), nn.Linear(H, 1)"],
    "counter": ['self.register_buffer("tokens_seen", torch.zeros(E, dtype=torch.long))'],
}
EXTRA_BEFORE = {
    "beyond": ["ids = torch.where(w > 0.15, ids, E)"],
    "below": ["ids = ids.masked_fill(w < 0.15, -1)"],
    "counter": ["with torch.no_grad():", "    self.tokens_seen += F.one_hot(ids, E).sum((0, 1))"],
}
EXTRA_AFTER = {
    "shared": ["out = out + self.shared(x)"],
    "shared_gated": ["out = out + self.shared_gate(x).sigmoid() * F.gelu(self.shared(x))"],
    "residual": ["out = x + out"],
    "dropout": ["out = F.dropout(out, 0.25, self.training)"],
}
EXTRAS = ("none", "shared", "shared_gated", "residual", "dropout", "counter", "beyond", "below")
RETURNED = {
    "tensor": "out",
    "logits": "out, logits",
    "ids": "out, ids",
    "loss": "out, E * (logits.softmax(-1).mean(0) * F.one_hot(ids[:, 0], E).to(x.dtype).mean(0)).sum()",
    "dict": '{"hidden": out, "router": {"weights": w, "logits": logits}}',
}


IMPORTS = """\
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
"""


def source(s: Spec) -> str:
    """The whole file."""
    sizes = f"H, I, E, K = {H}, {s.inner}, {s.experts}, {s.top_k}"
    return "\n".join([IMPORTS, sizes, *GLOBALS.get(s.mistake, []), "", "", *_experts(s), *_block(s), ""])


def _loops(s: Spec) -> bool:
    return s.spelling not in (*GATHERED, *DENSE)


def _experts(s: Spec) -> list[str]:
    return classes(s)


def _block(s: Spec) -> list[str]:
    init = ["super().__init__()", *router_init(s), *experts_init(s), *EXTRA_INIT.get(s.extra, []), *INIT.get(s.mistake, [])]
    how = "loop" if _loops(s) else "gather" if s.spelling in GATHERED else "dense"
    forward = ["def forward(self, hidden):", *indented(_forward(s))]
    body = [*CLASS.get(s.mistake, []), "def __init__(self):", *indented(init), "", *methods(s, how), *forward]
    return ["class Block(nn.Module):", *indented(body)]


def _forward(s: Spec) -> list[str]:
    changed = {**ROUTING, **SETTINGS, **DECIDED}.get(s.mistake, [])
    declared = [line for line in changed if line.startswith("global ")]
    changed = [line for line in changed if line not in declared]
    sums = loop_lines(s) if s.spelling == "loop" else style_lines(s)
    before, after = EXTRA_BEFORE.get(s.extra, []), EXTRA_AFTER.get(s.extra, [])
    shape = ["out = out.view_as(hidden)"] if s.batched else []
    x = "hidden.view(-1, H)" if s.batched else "hidden"
    routed = [*declared, f"x = {x}", *router_lines(s), *changed, *before]
    return [*routed, *sums, *RESULT.get(s.mistake, []), *after, *shape, f"return {RETURNED[s.returned]}"]


# ---------------------------------------------------------------- as modules
_numbers = itertools.count()


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzzed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Pair:
    """Two equal blocks of one file that share nothing, each with its own globals: one to be compiled, one to compare with."""

    def __init__(self, s: Spec) -> None:
        number = next(_numbers)
        path = _folder() / f"fuzzed_{number}.py"
        path.write_text(source(s))
        self.homes = [_load(path, f"fuzzed_{number}_{twin}") for twin in "ab"]
        self.subject, self.reference = (_block_of(home, s) for home in self.homes)

    def forget(self) -> None:
        for home in self.homes:
            sys.modules.pop(home.__name__, None)
        Path(str(self.homes[0].__file__)).unlink()


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = kept
    return module


def _block_of(home: ModuleType, s: Spec) -> nn.Module:
    torch.manual_seed(0)
    block: nn.Module = home.Block()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5 if p.dim() > 1 else 0.3)
    return block.train(s.training)


__all__ = ["EXTRAS", "LISTS", "RETURNED", "Pair", "source"]
