"""Every rule against the op it stands for, one ATen call at a time: sizes of 1, negative dimensions, broadcasting, both signs of a step.

A case is `op, arguments`; the lifted value is evaluated element by element and compared with what torch computes.  A case may also be
`closed`: the op stays a leaf, which is always right, and must not be opened wrongly.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from lifting import Program, Routed
from torch import Tensor

from moe_compile.passes.lift.expr import fresh_table
from moe_compile.passes.lift.rules import RULES

_seed = itertools.count()


def f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(_seed)), dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return f(*shape).abs() + 0.5


def mask(*shape: int) -> Tensor:
    return f(*shape) > 0


def ints(*shape: int, high: int = 4) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(next(_seed)))


def ids(*shape: int, n: int = 4, distinct: bool = True) -> Routed:
    if not distinct:
        return Routed(ints(*shape, high=n), n, False)
    scores = torch.rand(*shape[:-1], n, generator=torch.Generator().manual_seed(next(_seed)))
    return Routed(scores.topk(shape[-1], dim=-1).indices, n)


def wide(*shape: int, n: int) -> Routed:
    """ids below n of which only 0 .. n is known"""
    return Routed(ids(*shape, n=n).ids, n + 1)


class Case:
    def __init__(self, op: str, *args, closed: bool = False, **kwargs):
        self.op, self.args, self.kwargs, self.closed = op, args, kwargs, closed


PAIRS = [((3, 4), (4,)), ((3, 1), (1, 4)), ((1,), (2, 3)), ((), (2, 3)), ((2, 1, 3), (4, 1)), ((1, 1), (1,)), ((4, 1), (4, 1))]
UNARY = ["silu", "sigmoid", "relu", "tanh", "neg", "exp", "erf", "abs", "hardswish", "hardsigmoid", "mish", "sin", "cos", "expm1", "floor",
         "softplus", "leaky_relu", "elu", "gelu"]  # fmt: skip

POINTWISE = [
    *[Case(f"{op}.Tensor", f(*a), f(*b)) for op in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne") for a, b in PAIRS],
    *[Case(f"{op}.Tensor", f(*a), positive(*b)) for op in ("div",) for a, b in PAIRS],
    *[Case(f"{op}.default", f(*a), f(*b)) for op in ("maximum", "minimum") for a, b in PAIRS[:3]],
    *[Case(f"{op}.Scalar", f(3, 1), s)
      for op in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "rsub", "div") for s in (2, -0.5, 1)],
    *[Case(f"{op}.Scalar", ids(3, 2), s) for op in ("eq", "ne", "lt", "le", "gt", "ge", "add", "mul") for s in (0, 3, 4, -1, 1.5)],
    *[Case(f"{op}.default", x) for op in UNARY for x in (f(2, 3), f(1), f())],
    *[Case(f"{op}.default", positive(2, 1)) for op in ("rsqrt", "sqrt", "log", "log1p", "reciprocal")],
    Case("add.Tensor", f(3), f(3), alpha=2, closed=True), Case("sub.Tensor", f(3), f(3), alpha=0.5, closed=True),
    Case("rsub.Scalar", f(3), 1.5, 2, closed=True), Case("leaky_relu.default", f(4), 0.3), Case("elu.default", f(4), 0.5),
    Case("elu.default", f(4), 1.0, 2.0, closed=True), Case("gelu.default", f(4), approximate="tanh"),
    Case("softplus.default", f(4), 2, closed=True), Case("softplus.default", f(4), 1, 1, closed=True),
    Case("pow.Tensor_Scalar", f(2, 3), 2), Case("pow.Tensor_Scalar", positive(2), 0.5), Case("pow.Tensor_Scalar", f(2), 3),
    Case("div.Tensor", ids(3, 2), torch.tensor(2)), Case("div.Scalar", ids(3, 2), 1), Case("div.Scalar", ids(3, 2), 4),
    Case("eq.Tensor", f(2, 2), torch.full((2, 2), torch.nan, dtype=torch.float64)),
    Case("where.self", mask(3, 1), f(1, 4), f(4)), Case("where.self", mask(2), f(), f(2)),
    Case("where.ScalarOther", mask(3), f(3), 0.0), Case("where.ScalarOther", mask(3), f(3), -1.5),
    Case("where.ScalarSelf", mask(3), 0.0, f(3)), Case("where.ScalarSelf", mask(3), 2, f(3)), Case("where.Scalar", mask(3), 0.5, 0),
    Case("masked_fill.Scalar", f(3, 4), mask(3, 1), 0), Case("masked_fill.Scalar", f(3, 4), mask(4), -2.0),
    Case("masked_fill.Tensor", f(3), mask(3), torch.tensor(0.0, dtype=torch.float64)),
    Case("logical_and.default", mask(3, 1), mask(4)), Case("logical_or.default", mask(3, 1), mask(4)), Case("logical_not.default", mask(3)),
    Case("bitwise_and.Tensor", mask(3), mask(3)), Case("bitwise_or.Tensor", mask(3), mask(1)), Case("bitwise_not.default", mask(3)),
    Case("bitwise_and.Tensor", ints(3), ints(3), closed=True), Case("bitwise_or.Tensor", ints(3), ints(3), closed=True),
    Case("bitwise_not.default", ints(3), closed=True), Case("logical_not.default", ints(3), closed=True),
    Case("add.Tensor", mask(4), mask(4), closed=True), Case("mul.Tensor", mask(4), mask(4)),
    Case("eq.Tensor", mask(4), mask(4)), Case("ne.Tensor", mask(4), mask(4)), Case("ne.Scalar", mask(4), 0), Case("eq.Scalar", mask(4), 0),
    Case("floor_divide.default", ids(3, 2), torch.tensor(2), closed=True),
    Case("floor_divide.default", ids(3, 2), torch.tensor(-2), closed=True),
    Case("div.Tensor_mode", ids(3, 2), torch.tensor(3), rounding_mode="floor", closed=True),
    Case("div.Scalar_mode", ids(3, 2), 2, rounding_mode="trunc"),
    Case("div.Scalar_mode", ids(3, 2), 2, rounding_mode=None, closed=True),
    Case("div.Scalar_mode", f(3), 2, rounding_mode="floor", closed=True),
    Case("remainder.Scalar", ids(3, 2), 2), Case("remainder.Scalar", ints(3) - 2, 3, closed=True),
    Case("remainder.Scalar", ids(3, 1), -3, closed=True),
    Case("remainder.Scalar", f(3), 2, closed=True),
    *[Case("clamp.default", f(4), *limits) for limits in ((-0.5, 0.5), (None, 0.2), (0.1, None), (1, -1))],
    *[Case("clamp.default", ids(3, 2), *limits) for limits in ((0, 3), (1, 2), (0.5, None), (None, 2.5), (0, 100))],
    Case("clamp_min.default", f(3), 0), Case("clamp_max.default", f(3), 0), Case("clamp_min.default", ids(3, 2), 0),
    Case("clamp.default", f(3), min=-0.25), Case("clamp.default", f(3), max=0.25),
    *[Case(f"{op}.default", f(2, 3)) for op in ("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous")],
]  # fmt: skip

CASTS = [
    *[Case("_to_copy.default", f(5) * 3, dtype=d)
      for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)],
    *[Case("_to_copy.default", ids(3, 2), dtype=d)
      for d in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool)],
    *[Case("_to_copy.default", mask(4), dtype=d) for d in (torch.float32, torch.int64, torch.bool)],
    *[Case("_to_copy.default", Routed(ints(5, high=400), 400, False), dtype=d)
      for d in (torch.bfloat16, torch.int8, torch.uint8, torch.int16)],
    *[Case("_to_copy.default", ints(5, high=10**9) * 1000, dtype=d) for d in (torch.float64, torch.int16)],
    *[Case("copy.default", d, s)
      for d, s in ((f(3, 4), f(4)), (f(3, 4), f(1, 1)), (f(3, 4), f()), (ints(3), f(3) * 5), (f(1, 2), f(1, 2)))],
    Case("copy.default", f(3).bfloat16(), f(3)), Case("copy.default", f(3), ids(2, 3, n=4).ids[0]),
]  # fmt: skip

CONSTANTS = [
    Case("zeros.default", [3, 1]), Case("ones.default", [2]), Case("zeros_like.default", f(2, 1)), Case("ones_like.default", f(2)),
    Case("new_zeros.default", f(2), [3, 1]), Case("new_ones.default", f(2), [3]), Case("zero.default", f(3)),
    Case("new_full.default", f(2), [3], 1.5),
    Case("full.default", [3], 2.7, dtype=torch.int64), Case("full.default", [3], 0.1, dtype=torch.bfloat16), Case("full.default", [], 3),
    Case("full.default", [2], True), Case("full.default", [2], 5, dtype=torch.bool), Case("full_like.default", ints(3), 0.5),
    Case("full_like.default", f(3), float("-inf")), Case("fill.Scalar", ints(3), 2.7), Case("fill.Scalar", f(3), 2.7),
    Case("scalar_tensor.default", 2.5), Case("scalar_tensor.default", 2.5, dtype=torch.int64),
    Case("scalar_tensor.default", 0.1, dtype=torch.bfloat16),
    Case("arange.default", 4), Case("arange.default", 1), Case("arange.default", 2.5), Case("arange.default", 5, dtype=torch.float32),
    Case("arange.start", 0, 4), Case("arange.start", 1, 4, closed=True), Case("arange.start_step", 0, 6, 2, closed=True),
    Case("arange.start_step", 0, 3, 1),
]  # fmt: skip

VIEWS = [
    *[Case("view.default", f(4, 6), s) for s in ([24], [-1, 6], [2, 2, 6], [4, 2, 3], [4, 1, 6], [8, 3], [1, 24], [2, 12])],
    Case("view.default", f(1, 1), [1]), Case("view.default", f(1), []), Case("view.default", f(), [1, 1]),
    Case("view.default", f(6, 1, 2), [12]),
    Case("view.default", f(4, 6), [3, 8], closed=True), Case("reshape.default", f(2, 6), [3, 4], closed=True),
    Case("reshape.default", f(2, 6), [4, 3]), Case("_unsafe_view.default", f(2, 3, 4), [6, 4]),
    Case("t.default", f(2, 3)), Case("t.default", f(3)),
    *[Case("transpose.int", f(2, 3, 1), a, b) for a, b in ((0, 1), (-1, 0), (1, -1), (0, 0))],
    Case("permute.default", f(2, 3, 4), [2, 0, 1]), Case("permute.default", f(2, 3, 4), [-1, 0, -2]),
    Case("permute.default", f(1, 3), [1, 0]),
    *[Case("unsqueeze.default", f(2, 3), d) for d in (0, 1, 2, -1, -2, -3)], Case("unsqueeze.default", f(), 0),
    Case("squeeze.default", f(1, 3, 1)), *[Case("squeeze.dim", f(1, 3, 1), d) for d in (0, 1, -1)],
    Case("squeeze.dims", f(1, 3, 1), [0, -1]),
    Case("squeeze.dims", f(1, 3, 1), [0, 1]),
    *[Case("expand.default", f(*s), e)
      for s, e in (((3, 1), [3, 4]), ((3, 1), [-1, 4]), ((1,), [2, 3]), ((2, 3), [4, 2, 3]), ((), [2]), ((1, 2), [1, 2]))],
    *[Case("repeat.default", f(*s), r) for s, r in (((2, 3), [2, 1]), ((2,), [3, 2]), ((1, 2), [3, 1]), ((2, 2), [1, 2, 3]), ((), [2]))],
    Case("repeat_interleave.self_int", f(2, 3), 2), Case("repeat_interleave.self_int", f(2, 3), 2, 0),
    Case("repeat_interleave.self_int", f(2, 3), 3, -1),
    Case("repeat_interleave.self_int", f(1, 3), 2, 0), Case("repeat_interleave.self_int", f(2, 1), 1, 1),
    Case("flip.default", f(3, 2), [0]), Case("flip.default", f(3, 2), [-1, 0]), Case("flip.default", f(1, 2), [0], closed=True),
    *[Case("select.int", f(3, 4), d, i) for d, i in ((0, 0), (0, -1), (1, 3), (-1, -4), (-2, 2))], Case("select.int", f(1, 2), 0, 0),
    Case("unbind.int", f(3, 2)), Case("unbind.int", f(3, 2), -1), Case("unbind.int", f(1, 2)),
    *[Case("slice.Tensor", f(6, 4), *a)
      for a in ((0,), (0, 0, 3), (0, 3, 6), (0, 2, 4), (-1, 2, 4), (1, 0, 1), (0, -3), (0, 0, -3), (0, 1, 2**63 - 1))],
    *[Case("slice.Tensor", f(6, 4), *a)
      for a in ((0, 0, 6, 2), (0, 1, 6, 2), (1, 1, 4, 2), (0, 2, 6, 3), (0, 0, 5, 2), (0, 1, 6, 3), (1, 1, 3), (0, 1, 6), (0, 5, 100),
        (0, 0, 100))],
    *[Case("slice.Tensor", f(6, 4), *a, closed=True) for a in ((0, 0, 4, 2), (0, 4, 2), (0, 2, 6, 2), (0, 0, 3, 2))],
    Case("slice.Tensor", f(1, 4), 0, 0, 1),
    Case("split.Tensor", f(6, 2), 2), Case("split.Tensor", f(6, 2), 4), Case("split.Tensor", f(2, 6), 3, -1),
    Case("split.Tensor", f(1, 2), 1),
    Case("split_with_sizes.default", f(6, 2), [2, 4]), Case("split_with_sizes.default", f(6, 2), [1, 2, 3]),
    Case("split_with_sizes.default", f(2, 6), [3, 3], -1),
    *[Case("cat.default", [f(*a), f(*b)], d)
      for a, b, d in (((2, 3), (2, 3), 0), ((2, 3), (2, 3), -1), ((1, 3), (1, 3), 0), ((2, 1), (2, 1), 1))],
    Case("cat.default", [f(2, 3), f(1, 3)], 0, closed=True), Case("cat.default", [f(0, 3), f(2, 3)], 0),
    Case("cat.default", [f(0), f(2, 3)], 0),
    Case("constant_pad_nd.default", f(2, 3), [0, 0, 0, 1], closed=True),
    Case("cat.default", [f(2, 3)], 1), Case("cat.default", [f(2, 2), f(2, 2), f(2, 2)], 1),
    Case("stack.default", [f(2, 3), f(2, 3)]), Case("stack.default", [f(2, 3), f(2, 3), f(2, 3)], -1),
    Case("stack.default", [f(1), f(1)], 1),
    Case("stack.default", [f(), f()]), Case("stack.default", [f(2, 3), f(2, 3)], 1), Case("diagonal.default", f(3, 3), closed=True),
]  # fmt: skip

REDUCTIONS = [
    Case("sum.default", f(2, 3)), Case("sum.default", f(1)), Case("sum.default", mask(3, 2)),
    Case("sum.default", f(3).bfloat16(), dtype=torch.float32),
    *[Case("sum.dim_IntList", f(2, 3, 1), *a)
      for a in (([0],), ([-1],), ([0, 2],), ([-3, -2],), ([1], True), ([],), ([2, 1, 0], True), (None,))],
    Case("sum.dim_IntList", mask(3, 2), [0]), Case("sum.dim_IntList", ids(3, 2), [1]),
    Case("any.default", mask(2, 2)), *[Case("any.dim", mask(2, 3), *a) for a in ((0,), (-1, True))],
    Case("count_nonzero.dim_IntList", mask(2, 3), [0]), Case("count_nonzero.default", f(2, 3)),
    Case("any.dims", mask(2, 3, 1), [0, 2]),
    Case("any.default", ints(3), closed=True), Case("any.dim", mask(1, 3), 0),
    *[Case("mean.dim", f(2, 3, 1), *a) for a in (([0],), ([-2], True), ([0, 1],), ([2],), (None,))], Case("mean.dim", ints(3).float(), [0]),
    Case("mm.default", f(2, 3), f(3, 4)), Case("mm.default", f(1, 3), f(3, 1)), Case("mm.default", f(2, 1), f(1, 4)),
    Case("mm.default", f(1, 1), f(1, 1)),
    Case("convolution.default", f(2, 3, 4), f(5, 3, 1), f(5), [1], [0], [1], False, [0], 1),
    Case("convolution.default", f(2, 3, 4, 2), f(1, 3, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    Case("convolution.default", f(2, 3, 4), f(5, 3, 2), f(5), [1], [0], [1], False, [0], 1, closed=True),
    Case("convolution.default", f(2, 3, 4), f(5, 3, 1), f(5), [2], [0], [1], False, [0], 1, closed=True),
    Case("convolution.default", f(2, 3, 4), f(5, 3, 1), f(5), [1], [1], [1], False, [0], 1, closed=True),
    Case("convolution.default", f(2, 3, 4), f(3, 1, 1), f(3), [1], [0], [1], False, [0], 3, closed=True),
    Case("convolution.default", f(2, 3, 4), f(3, 5, 1), f(5), [1], [0], [1], True, [0], 1, closed=True),
    Case("bmm.default", f(2, 3, 4), f(2, 4, 1)), Case("bmm.default", f(1, 1, 4), f(1, 4, 2)), Case("bmm.default", f(3, 1, 2), f(3, 2, 1)),
    Case("mv.default", f(2, 3), f(3)), Case("mv.default", f(1, 1), f(1)), Case("dot.default", f(3), f(3)), Case("dot.default", f(1), f(1)),
    *[Case("matmul.default", f(*a), f(*b)) for a, b in (((2, 3), (3, 2)), ((2, 2, 3), (2, 3, 1)), ((2, 2, 3), (3, 2)))],
    *[Case("matmul.default", f(*a), f(*b), closed=True) for a, b in (((3,), (3,)), ((2, 3), (3,)))],
    *[Case("addmm.default", f(*c), f(2, 3), f(3, 4), **k)
      for c, k in (((4,), {}), ((2, 4), {}), ((2, 1), {}), ((1,), {}), ((4,), {"alpha": 2, "beta": 0.5}))],
    Case("addmm.default", f(4), f(2, 3), f(3, 4), beta=0), Case("baddbmm.default", f(2, 1, 4), f(2, 3, 2), f(2, 2, 4), beta=2),
    Case("_softmax.default", f(2, 3), -1, False, closed=True), Case("cumsum.default", f(3), 0, closed=True),
    Case("cumsum.default", ints(3), 0, closed=True),
    Case("bincount.default", ids(8, distinct=False), None, 4),
    Case("bincount.default", ids(8, distinct=False), minlength=6), Case("bincount.default", ids(8, distinct=False), f(8), 4, closed=True),
    Case("bincount.default", Routed(torch.tensor([0, 3, 1]), 4, False), None, 2, closed=True),
    Case("searchsorted.Tensor", f(4).sort().values, f(2), closed=True),
    Case("searchsorted.Tensor", ids(4, distinct=False), ints(2), closed=True),
]  # fmt: skip

READS = [
    *[Case("index.Tensor", f(4, 3), i)
      for i in ([ids(5, distinct=False)], [ids(2, 2)], [None, ids(2, n=3)], [ids(3, distinct=False), ids(3, n=3, distinct=False)])],
    *[Case("index.Tensor", f(4, 2, 3), i)
      for i in ([ids(2), None, ids(2, n=3)], [None, ids(2, 1, n=2), ids(3, n=3)], [ids(2, 1), None, ids(2, n=3)])],
    Case("index.Tensor", f(1, 3), [Routed(torch.zeros(2, dtype=torch.int64), 1, False)]),
    Case("index.Tensor", f(4, 3), [ints(3)], closed=True),
    Case("index.Tensor", f(3, 3), [wide(2, n=3)], closed=True), Case("index.Tensor", f(4, 3), [torch.tensor([-1, 0])], closed=True),
    Case("index_select.default", f(4, 3), 0, ids(5, distinct=False)), Case("index_select.default", f(2, 4), -1, ids(3)),
    Case("index_select.default", f(4, 3), 0, ints(2), closed=True), Case("embedding.default", f(4, 3), ids(2, 2)),
    Case("embedding.default", f(3, 2), wide(2, n=3), closed=True),
    Case("gather.default", f(3, 4), 1, ids(3, 2)), Case("gather.default", f(3, 4), -1, ids(2, 2)),
    Case("gather.default", f(3, 4), 1, ids(1, 2)),
    Case("gather.default", f(4, 3), 0, ids(2, 3)),
    Case("gather.default", f(3, 1), 1, Routed(torch.zeros(3, 2, dtype=torch.int64), 1, False)),
    Case("gather.default", f(1, 4), 1, ids(1, 3)), Case("gather.default", f(3, 3), 1, wide(3, 2, n=3), closed=True),
    Case("gather.default", f(2, 3, 4), 2, ids(2, 3, 2)),
    Case("masked_scatter.default", f(3, 2), mask(3, 1), f(6), closed=True),
    Case("masked_scatter.default", f(3), mask(3), f(3), closed=True),
    Case("masked_select.default", f(3, 2), mask(3, 2)), Case("masked_select.default", f(3, 2), mask(2)),
    Case("nonzero.default", mask(3, 2)),
    Case("nonzero.default", mask(4)), Case("nonzero.default", ints(5)), Case("nonzero.default", f(3) * 0),
    Case("nonzero.default", mask(1, 3)),
    Case("index.Tensor", f(4, 3), [mask(4)]), Case("index.Tensor", f(4, 3), [mask(4, 3)]), Case("index.Tensor", f(2, 4), [None, mask(4)]),
    Case("index.Tensor", f(4, 2), [torch.zeros(4, dtype=torch.bool)]), Case("index.Tensor", f(4, 2), [torch.ones(4, dtype=torch.bool)]),
]  # fmt: skip

WRITES = [
    *[Case("index_add.default", f(4, 3), 0, i, f(5, 3)) for i in (ids(5, distinct=False),)],
    Case("index_add.default", f(2, 4), -1, ids(3), f(2, 3)),
    Case("index_add.default", f(4), 0, ids(2), f(2), alpha=0.5), Case("index_add.default", f(4, 1), 0, ids(2), f(2, 1)),
    Case("index_add.default", f(3, 2), 0, wide(2, n=3), f(2, 2), closed=True),
    Case("index_add.default", f(1, 2), 0, Routed(torch.zeros(3, dtype=torch.int64), 1, False), f(3, 2)),
    Case("index_add.default", f(4, 3), 0, ints(5), f(5, 3), closed=True),
    *[Case(f"scatter_{op}", f(3, 4), 1, ids(3, 2), f(3, 2), *more) for op, more in (("add.default", ()), ("reduce.two", ("sum",)))],
    *[Case("scatter_add.default", f(*b), d, ids(*i, distinct=False), f(*s))
      for b, d, i, s in (((3, 4), 1, (3, 2), (3, 2)), ((4, 3), 0, (2, 3), (2, 3)), ((1, 4), 1, (1, 2), (1, 2)))],
    *[Case("scatter_add.default", f(3, 4), 1, ids(*i), f(*s), closed=True)
      for i, s in (((3, 1), (3, 2)), ((1, 2), (3, 2)), ((2, 2), (3, 2)), ((2, 2), (2, 2)))],
    Case("scatter_add.default", f(3, 4), 1, ints(3, 2), f(3, 2), closed=True),
    Case("scatter_add.default", f(4), 0, ids(3, distinct=False), torch.ones(3).double()),
    *[Case("scatter_reduce.two", f(3, 4), 1, ids(3, 2), f(3, 2), r, closed=True) for r in ("amax", "mean", "prod")],
    Case("scatter_reduce.two", f(3, 4), 1, ids(3, 2), f(3, 2), "sum", include_self=False, closed=True),
    Case("scatter.src", f(3, 4), 1, ids(3, 2), f(3, 2)), Case("scatter.src", torch.zeros(3, 4).double(), -1, ids(3, 2), f(3, 2)),
    Case("scatter.value", f(3, 4), 1, ids(3, 2), 1.0),
    Case("scatter.value", mask(3, 4), 1, ids(3, 2), True), Case("scatter.value", f(1, 4), 1, ids(1, 3), -2),
    Case("scatter.src", f(3, 4), 1, ids(3, 1), f(3, 1)),
    Case("scatter.src", f(3, 4), 1, ids(3, 2, distinct=False), f(3, 2), closed=True),
    Case("scatter.src", f(3, 4), 1, ids(3, 1), f(3, 2), closed=True),
    Case("scatter.src", f(3, 4), 1, ids(1, 2), f(3, 2), closed=True), Case("scatter.value", f(3, 4), 1, ids(1, 2), 1.0, closed=True),
    Case("scatter.src", f(4, 3), 0, ids(2, 3), f(2, 3), closed=True), Case("scatter.value", f(3, 3), 1, wide(3, 2, n=3), 1.0, closed=True),
    *[Case("index_put.default", f(4, 3), [i], v, True) for i, v in ((ids(5, distinct=False), f(5, 3)), (ids(2), f(1, 3)), (ids(2), f(3)))],
    Case("index_put.default", f(4, 3), [ids(2)], f(), True, closed=True),
    Case("index_put.default", f(4, 3), [ids(2, distinct=False)], f(2, 3), closed=True),
    Case("index_put.default", f(4, 3), [ids(2)], f(2, 3), closed=True),
    Case("index_put.default", f(4, 3), [ids(2), ids(2, n=3)], f(2), True),
    Case("index_put.default", f(4, 3), [ints(2)], f(2, 3), True, closed=True),
    *[Case("index_put.default", f(4, 3), [mask(4)], v) for v in (torch.tensor(2.0).double(),)],
    Case("index_put.default", f(4, 3), [mask(4, 3)], torch.tensor(0.0).double()),
    Case("_unsafe_index_put.default", f(4, 3), [ids(3, distinct=False)], f(3, 3), True),
    Case("index_copy.default", f(4, 3), 0, ids(2), f(2, 3), closed=True),
    Case("index_copy.default", f(3, 4), 1, ids(2), f(3, 2), closed=True),
    *[Case("slice_scatter.default", f(4, 2), f(n, 2), 0, *a)
      for n, a in ((2, (0, 2)), (2, (2, 4)), (1, (1, 2)), (4, ()), (2, (-2,)), (1, (3, 100)), (4, (0, 4)))],
    *[Case("slice_scatter.default", f(4, 2), f(n, 2), 0, *a, closed=True)
      for n, a in ((2, (1, 3)), (2, (0, 3, 2)), (3, (0, 3)), (2, (0, 4, 3)))],
    *[Case("slice_scatter.default", f(4, 2), f(2, 2), 0, *a) for a in ((0, 4, 2), (1, None, 2))],
    Case("slice_scatter.default", f(2, 6), f(2, 2), 1, 2, 9, 3),
    Case("slice_scatter.default", f(2, 4), f(2, 2), -1, 2, 4),
    *[Case("select_scatter.default", f(3, 4), f(*s), d, i) for s, d, i in (((4,), 0, 1), ((4,), 0, -1), ((3,), 1, 2), ((3,), -1, -4))],
    Case("select_scatter.default", f(1, 2), f(2), 0, 0),
]  # fmt: skip

SORTS = [
    Case("sort.default", f(4), closed=True), Case("sort.default", ids(4, 2), closed=True),
    Case("sort.stable", ids(6, distinct=False), stable=True, descending=True, closed=True),
    Case("sort.default", ids(6, distinct=False), -1, True, closed=True),
]  # fmt: skip

CASES = {

    "pointwise": POINTWISE, "casts": CASTS, "constants": CONSTANTS, "views": VIEWS, "reductions": REDUCTIONS, "reads": READS,
    "writes": WRITES, "sorts": SORTS,
}  # fmt: skip


def bytes_(*shape: int) -> Tensor:
    return ints(*shape, high=256).to(torch.uint8)


def signed(*shape: int) -> Tensor:
    return (ints(*shape, high=256) - 128).to(torch.int8)


CASES["bits"] = [
    *[Case("bitwise_and.Scalar", x, m) for x in (bytes_(3, 4), signed(3, 4)) for m in (15, 0x70, 1, 128 if x.dtype == torch.uint8 else 64)],
    *[Case("bitwise_and.Scalar", bytes_(3), m, closed=True) for m in (5, 0)], Case("bitwise_and.Scalar", signed(3), -16, closed=True),
    Case("bitwise_and.Scalar", mask(3), True, closed=True),
    *[Case(f"{op}", x, 4) for op in ("__rshift__.Scalar", "bitwise_right_shift.Tensor_Scalar") for x in (bytes_(3, 2), signed(2))],
    Case("bitwise_right_shift.Tensor", bytes_(2, 2), torch.full((2, 2), 4, dtype=torch.uint8), closed=True),
    Case("__rshift__.Scalar", f(2).float().to(torch.int64), 70, closed=True),
    Case("view.dtype", signed(3, 2), torch.uint8), Case("view.dtype", bytes_(3, 2), torch.int8),
    Case("view.dtype", torch.arange(120, 135, dtype=torch.uint8), torch.float8_e8m0fnu),
    Case("view.dtype", torch.arange(0, 127, dtype=torch.uint8), torch.float8_e4m3fn),
    Case("view.dtype", torch.arange(-128, -1, dtype=torch.int8), torch.float8_e4m3fn),
    Case("view.dtype", f(4), torch.int64, closed=True),
    Case("exp2.default", f(3)), Case("pow.Scalar", 2, f(3)), Case("pow.Scalar", 2.0, ids(3, 2)), Case("pow.Scalar", 3, f(3), closed=True),
    Case("ldexp.Tensor", f(3, 2), ints(3, 1)), Case("ldexp.Tensor", f(2), f(2)),
    # what a byte cannot hold wraps around
    Case("sub.Tensor", bytes_(3), 8, closed=True), Case("add.Tensor", bytes_(3), bytes_(3), closed=True),
    Case("mul.Tensor", signed(3), 2, closed=True), Case("sub.Tensor", bytes_(3).to(torch.int32), 8),
]  # fmt: skip


def run(case: Case) -> tuple[str | None, str | None]:
    """(why the op stayed closed, how its value is wrong)"""
    with fresh_table():
        p = Program()
        n = p.call(case.op, *case.args, **case.kwargs)
        try:
            why = p.closed(n)
        except Exception as e:  # noqa: BLE001  (a rule may refuse what has no leaf either)
            return str(e), None if case.closed else f"{type(e).__name__}: {e}"
        return why, None if why else p.error(n)


def told(case: Case) -> str:
    shown = [tuple(a.shape) if isinstance(a, Tensor) else ("ids", tuple(a.ids.shape)) if isinstance(a, Routed) else a for a in case.args]
    return f"{case.op}{tuple(shown)} {case.kwargs or ''}"


@pytest.mark.parametrize("family", CASES)
def test_a_lifted_op_computes_what_the_op_computes(family):
    wrong = []
    for case in CASES[family]:
        why, error = run(case)
        if error or bool(why) != case.closed:
            wrong.append(f"{told(case)}: {error or (why and 'closed: ' + why) or 'must stay closed'}")
    assert not wrong, "\n".join(wrong)


# Ops that only make sense behind others (test_lift_rows.py), or that are not ATen's.
ELSEWHERE = {

    "_grouped_mm.default", "transformers.grouped_mm_fallback.default", "argsort.default", "argsort.stable", "item.default",
    "_local_scalar_dense.default",
    "histc.default", "add", "sub", "mul", "sym_sum", "sym_size.int", "empty.memory_format", "empty_like.default", "new_empty.default",
}  # fmt: skip


def test_every_rule_is_compared_with_its_op():
    tried = {case.op for cases in CASES.values() for case in cases}
    assert set(RULES) - tried - ELSEWHERE == set()
