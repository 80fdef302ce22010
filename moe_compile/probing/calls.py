"""What a torch call does, told by its short name."""

from __future__ import annotations

_OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"]
_AUGMENTED = {spelled for n in _OPERATORS for spelled in (f"__i{n}__", f"i{n}")} | {"setitem", "__setitem__", "__idiv__"}


def writes(name: str) -> bool:
    """Does it write into its first argument?  add_, x += 1, x[rows] = y."""
    return name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))
