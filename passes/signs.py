"""Which tensors of a Dynamo graph hold no negative number, as far as their code tells: probabilities, and what is chosen of them."""

from __future__ import annotations

from torch.fx import Node

from .decisions import callee

_NEVER = {"softmax", "sigmoid", "exp", "relu", "softplus", "abs", "square", "hardsigmoid", "one_hot"}
_PART_OF = {
    "topk", "max", "min", "sort", "getitem", "gather", "take_along_dim", "index_select", "view", "reshape", "flatten", "unsqueeze",
    "squeeze", "expand", "permute", "transpose", "t", "contiguous", "to", "float", "type_as", "detach", "clone", "sum", "mean", "amax",
}  # fmt: skip
_MADE_OF = {"add", "mul", "truediv", "div"}


def never_negative(n: object) -> bool:
    """Holds for a number that is not, too. What is written into in place is not looked at."""
    if isinstance(n, int | float):
        return n >= 0
    if not isinstance(n, Node) or callee(n) in _NEVER:
        return isinstance(n, Node)
    name = callee(n)
    if name in _PART_OF:
        return bool(n.args) and never_negative(n.args[0])
    return name in _MADE_OF and not n.kwargs and all(never_negative(a) for a in n.args)


__all__ = ["never_negative"]
