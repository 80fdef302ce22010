"""One rule per ATen op: values of the inputs -> value of the output.  A rule raises `Refused` where it does not apply.

`RULES["add.Tensor"](it, node, *args, **kwargs)`: `it` is the interpreter, `node` the FX node (its `meta["val"]` has the shape), args are
`Value`s, numbers and lists of them.  To teach the lifter an op, write one function with `@rule(...)` in the file of its family.
"""

from . import bits, create, gather, mask, pointwise, reduce, scatter, segments, sort, views  # noqa: F401  (they register their rules)
from ._base import RULES

__all__ = ["RULES"]
