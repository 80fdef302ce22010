"""What is kept of a recorded forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.fx import Graph, Node

from moe_compile.probing.numbers import Numbers
from moe_compile.probing.reads import Reads


@dataclass
class Recording:
    """graph: placeholders are the tensors among the arguments; `get_attr` and `call_module` name what the module holds."""

    graph: Graph
    output: Any  # the result with nodes for tensors
    lines: dict[Node, int]
    file: str
    numbers: Numbers
    inputs: list[Any]  # the fake arguments, flattened
    sources: dict[sympy.Symbol, tuple[int, int]]  # (argument, dim) of each size
    paths: list[str] = field(default_factory=list)  # how to reach each of `inputs` from `args` and `kwargs`
    assumptions: dict[str, None] = field(default_factory=dict)
    rebound: dict[str, Node] = field(default_factory=dict)
    written: list[tuple[str, str]] = field(default_factory=list)  # attributes that the program gives plain values, (path of a module, name)
    entered: list[str] = field(default_factory=list)  # submodules that were recorded from within
    reads: Reads = field(default_factory=Reads)
    classes: list[int] = field(default_factory=list)  # among how many ids the code counts
    beyond: int = 0  # so many tokens to one expert are to be checked as well
    values: dict[Node, Any] = field(default_factory=dict)  # what each node has given
