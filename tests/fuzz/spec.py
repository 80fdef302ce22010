"""What one random block is made of: a name from each part of the grammar.  `source.py` writes it as Python."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

H = 8
PLAIN = "none"  # no mistake


@dataclass(frozen=True)
class Spec:
    """experts, top_k, inner: sizes; all other fields name an entry of the grammar's part of that name.

    first, tokens: tokens of the call that is compiled first, and of those after it.
    """

    spelling: str = "loop"
    mistake: str = PLAIN
    router: str = "softmax_topk"
    storage: str = "list"
    body: str = "mlp"
    act: str = "silu"
    biases: bool = False
    head: str = "range"
    select: str = "where"
    skip: str = "never"
    add: str = "index_add_"
    weighted: str = "after"
    extra: str = "none"
    returned: str = "tensor"
    training: bool = False
    grad: bool = True
    dynamic: bool = True
    batched: bool = False
    edit: str = "none"
    experts: int = 4
    top_k: int = 2
    inner: int = 8
    first: int = 5
    tokens: tuple[int, ...] = (5, 7)

    @property
    def told(self) -> str:
        """The spelling with what it is made of, to count by."""
        return f"{self.spelling} {self.head} {self.select}" if self.spelling == "loop" else self.spelling

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Spec({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


def indented(lines: list[str], levels: int = 1) -> list[str]:
    return [("    " * levels + line) if line else "" for line in lines]
