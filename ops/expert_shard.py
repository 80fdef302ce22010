"""Ops of a sharded model: where the naive code reads experts that are spread over ranks.

    expert_shard    all E experts [E, ...] of a stacked parameter, of which this rank holds [E_local, ...]
    present_expert  a parameter of one expert of a list, held here
    absent_expert   the same of an expert held by another rank: only its shape is known

They stand in Dynamo's graph until the compiler has put an exchange and the local experts there; none can be computed on
one rank, so their kernels raise RuntimeError. `Elsewhere` is the same in eager code: a tensor that one can look at, not
compute with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch

from ._register import Op, below_autograd, register_op

# where: Place.text. A text, as Dynamo takes numbers that differ from module to module for variables.
SHARD_SCHEMA = "expert_shard(Tensor local_EX, str where) -> Tensor"
PRESENT_SCHEMA = "present_expert(Tensor param, str where) -> Tensor"
ABSENT_SCHEMA = "absent_expert(Tensor anchor, str where) -> Tensor"
WAY_OUT = (
    "run this model through moe_compile.compile(model, parallel=...), whose report says why a block was not rewritten, "
    "or leave these parameters out with shard_experts(..., experts=[...]); named_parameters() and state_dict() give this "
    "rank's part"
)


def spread(what: str, num_experts: int, ep: int) -> NoReturn:
    """Raises RuntimeError: `what` was to be computed on one rank."""
    raise RuntimeError(f"{what}: {num_experts} experts are spread over {ep} ranks, and no rank holds them all; {WAY_OUT}")


class Place(NamedTuple):
    """Where a parameter's experts are. first: the first one held, or the number of a list's expert. shape: of the whole parameter."""

    num_experts: int
    first: int
    ep: int
    shape: tuple[int, ...]

    @property
    def text(self) -> str:
        return f"{self.num_experts} experts,first {self.first},ep {self.ep},shape {'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises ValueError for what is no Place.text."""
        found = _PLACE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} does not say where experts are; take it from Place(...).text")
        num_experts, first, ep, shape = found.groups()
        return cls(int(num_experts), int(first), int(ep), tuple(int(n) for n in shape.split("x") if n))


_PLACE = re.compile(r"(\d+) experts,first (\d+),ep (\d+),shape ([\dx]*)")


def _shard_kernel(local_EX: Any, where: str) -> NoReturn:
    place = Place.parse(where)
    held = f"experts {place.first} to {place.first + local_EX.shape[0] - 1} of a parameter [{place.num_experts}, ...]"
    spread(f"this rank holds {held} and its code reads all", place.num_experts, place.ep)


def _present_kernel(param: Any, where: str) -> NoReturn:
    place = Place.parse(where)
    spread(f"expert {place.first} of a list would see this rank's tokens only", place.num_experts, place.ep)


def _absent_kernel(anchor: Any, where: str) -> NoReturn:
    place = Place.parse(where)
    spread(f"a parameter {list(place.shape)} of expert {place.first} of a list is held by another rank", place.num_experts, place.ep)


def _shard_fake(local_EX: Any, where: str) -> Any:
    return local_EX.new_empty((Place.parse(where).num_experts, *local_EX.shape[1:]))


def _present_fake(param: Any, where: str) -> Any:
    return torch.empty_like(param)


def _absent_fake(anchor: Any, where: str) -> Any:
    return anchor.new_empty(Place.parse(where).shape)


class _Placed(torch.autograd.Function):
    """Makes the op's fake result require a gradient where the parameter does; there is no gradient to compute here."""

    @staticmethod
    def forward(ctx: Any, held: Any, op: Callable[..., Any], *rest: Any) -> Any:
        ctx.op = op
        with below_autograd():
            return op(held, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> NoReturn:
        raise RuntimeError(f"the gradient of {ctx.op} was asked for, but experts are spread over ranks; {WAY_OUT}")


def _placed(op: Callable[[], Op]) -> Callable[..., Any]:
    def autograd(held: Any, *rest: Any) -> Any:
        if torch.is_grad_enabled() and held.requires_grad:
            return _Placed.apply(held, op().overload, *rest)
        with below_autograd():
            return op().overload(held, *rest)

    return autograd


SHARD: Op = register_op(SHARD_SCHEMA, _shard_kernel, _shard_fake, _placed(lambda: SHARD))
PRESENT: Op = register_op(PRESENT_SCHEMA, _present_kernel, _present_fake, _placed(lambda: PRESENT))
ABSENT: Op = register_op(ABSENT_SCHEMA, _absent_kernel, _absent_fake, _placed(lambda: ABSENT))
OPS = (SHARD, PRESENT, ABSENT)


SHARDS = "_moe_compile_shards"  # attribute of a sharded module: name -> Shard
ANCHOR = "_anchor_"  # before a parameter's name: the buffer that follows dtype and device of what is elsewhere


class Elsewhere(torch.Tensor):
    """What eager code reads in place of a sharded parameter: its shape, dtype and device; every computation raises RuntimeError.

    Reading must not fail: printing a model, hasattr and checks such as `bias is not None` read parameters.
    """

    _where: tuple[str, int, int]

    @staticmethod
    def of(like: Any, shape: tuple[int, ...], what: str, num_experts: int, ep: int) -> Elsewhere:
        """like: the held tensor, or the anchor, whose dtype, device and requires_grad it takes."""
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            Elsewhere, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made._where = (what, num_experts, ep)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = [a for a in (*args, *(kwargs or {}).values()) for a in (a if isinstance(a, (list, tuple)) else [a])]
        what, num_experts, ep = next((a._where for a in found if isinstance(a, Elsewhere)), ("a sharded parameter", 0, 0))
        spread(f"{what} is used by {func} in eager code", num_experts, ep)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        what, num_experts, ep = self._where
        return f"Elsewhere({what}, shape={tuple(self.shape)}, {num_experts} experts over {ep} ranks)"


def reader(name: str, kind: str) -> Callable[[Any], Any]:
    """The getter of a sharded module's attribute: the op where Dynamo traces, Elsewhere in eager code.

    kind: "stacked", "present" or "absent". The module's SHARDS hold a moe_compile.sharding.Shard for each name.
    """

    def stacked(self: Any) -> Any:
        shard, local = self._moe_compile_shards[name], self._parameters[name]
        if not torch.compiler.is_compiling():
            return Elsewhere.of(local, shard.shape, f"all of {name}", shard.num_experts, shard.ep)
        local = local.to_local() if shard.dtensor else local
        return SHARD.overload(local, shard.where)

    def present(self: Any) -> Any:
        shard, param = self._moe_compile_shards[name], self._parameters[name]
        if not torch.compiler.is_compiling():
            return Elsewhere.of(param, shard.shape, f"{name} of expert {shard.first}", shard.num_experts, shard.ep)
        return PRESENT.overload(param, shard.where)

    def absent(self: Any) -> Any:
        shard, anchor = self._moe_compile_shards[name], self._buffers[ANCHOR + name]
        if not torch.compiler.is_compiling():
            return Elsewhere.of(anchor, shard.shape, f"{name} of expert {shard.first}", shard.num_experts, shard.ep)
        return ABSENT.overload(anchor, shard.where)

    return {"stacked": stacked, "present": present, "absent": absent}[kind]


def sample_inputs(device: str = "cpu", dtype: Any = torch.float32) -> Iterator[tuple[Op, tuple[Any, ...]]]:
    """(op, arguments) of each op, two of four experts held."""
    held = torch.ones((2, 3, 5), device=device, dtype=dtype)
    yield SHARD, (held, Place(4, 2, 2, (4, 3, 5)).text)
    yield PRESENT, (held[0], Place(4, 1, 2, (3, 5)).text)
    yield ABSENT, (held.new_empty(0), Place(4, 1, 2, (3, 5)).text)
