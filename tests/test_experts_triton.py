"""The Triton experts against the loop over experts: in the interpreter, and the same cases and larger ones on a GPU."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases
from triton_cases import (
    APART,
    BIASED,
    DEEP,
    FUNCTION_PROGRAMS,
    HALVES,
    ONE,
    PAIRS,
    SINGLE,
    SWAPPED_HALVES,
    WEIGHTED_ROWS,
    Sizes,
    run,
    run_backward,
)

from moe_compile.ops import experts, experts_combine, experts_triton, experts_two_steps
from moe_compile.ops.kernels import configs, configs_backward, launch, launch_backward
from moe_compile.ops.kernels.layers import typical_layers
from moe_compile.ops.program import parse
from moe_compile.ops.quantize_dispatch import counting_sort

CASES = Cases(__file__)
PROGRAMS = {
    "halves": HALVES, "swapped halves": SWAPPED_HALVES, "pairs": PAIRS, "biased": BIASED, "apart": APART, "one": ONE, "deep": DEEP,
    "single": SINGLE, "weighted rows": WEIGHTED_ROWS,
}  # fmt: skip
TURNED_PAIRS = "mm(1, silu(cols(mm(0, x), 1, {j}, 2)) * cols(mm(0, x), 0, {j}, 2))"
LAYOUTS = ("eoi", "eio", "oi*", "io*")
SMALL = Sizes(7, 2, 4, 24, 16)


@CASES.add(*((name, layout) for name in PROGRAMS for layout in LAYOUTS))
def programs(name: str, layout: str) -> None:
    run(PROGRAMS[name], layout, SMALL, block=16, routing="holes")


@CASES.add(*((name,) for name in FUNCTION_PROGRAMS))
def functions(name: str) -> None:
    """Every function of ops/functions.py in an epilogue."""
    run(FUNCTION_PROGRAMS[name], "eio", Sizes(5, 2, 3, 8, 16))


@CASES.add(*((rows, name) for rows in (16, 32, 64, 128) for name in ("halves", "pairs", "apart", "one")))
def blocks(rows: int, name: str) -> None:
    """Several blocks of an expert, and the tiles that are chosen for them."""
    run(PROGRAMS[name], "eoi", Sizes(90, 2, 3, 32, 24), block=rows, routing="one" if rows == 64 else "random")


@CASES.add(
    *((sizes,) for sizes in ((0, 2, 4, 16, 16), (1, 1, 1, 16, 16), (1, 4, 4, 16, 8), (33, 1, 5, 20, 12), (5, 3, 3, 7, 5), (4, 2, 64, 8, 8)))
)
def odd_sizes(sizes: tuple[int, ...]) -> None:
    run(HALVES, "eoi", Sizes(*sizes))
    run(BIASED, "eio", Sizes(*sizes))


@CASES.add(*((dtype, name) for dtype in (torch.bfloat16, torch.float16) for name in ("halves", "biased", "apart")))
def half_precision(dtype: torch.dtype, name: str) -> None:
    run(PROGRAMS[name], "eoi", SMALL, dtype=dtype)


@CASES.add(*((name, layout) for name in PROGRAMS for layout in LAYOUTS))
def one_token(name: str, layout: str) -> None:
    """Slots by themselves, without sorting."""
    run(PROGRAMS[name], layout, Sizes(1, 3, 5, 24, 20), routing="holes", seed=3)


@CASES.add(*((name, parts) for name in ("halves", "pairs", "turned pairs", "biased", "apart", "weighted rows") for parts in (True, False)))
def one_token_by_outputs(name: str, parts: bool) -> None:
    """Outputs next to each other in memory; the last layer's inputs in parts, or all in one program."""
    program = TURNED_PAIRS if name == "turned pairs" else PROGRAMS[name]
    with mock.patch.object(configs, "PROGRAMS", 64 if parts else 0):
        run(program, "eio" if parts else "io*", Sizes(1, 3, 4, 36, 300), routing="holes", seed=3)


@CASES.add()
def many_tiles() -> None:
    """More columns than a tile has, in every way that tiles go over them."""
    for changes in ({"cols": 16, "depth": 16}, {"cols": 16, "swap": True}, {"cols": 32, "persistent": True, "half": True, "group": 2}):
        for layout in LAYOUTS:
            run(HALVES, layout, Sizes(20, 2, 2, 40, 40), block=16, **changes)


@CASES.add()
def rows_that_were_spread() -> None:
    for program in (HALVES, APART):
        run(program, "eoi", Sizes(40, 2, 3, 32, 32), block=32, routing="holes", spread=True, persistent=True)


@CASES.add(*((skip, swap) for skip in (True, False) for swap in (True, False)))
def padding_of_gathered_rows(skip: bool, swap: bool) -> None:
    """Zeros that nothing reads, or a row again; inputs in whole tiles and not, an expert without rows."""
    for program, hidden, persistent in ((HALVES, 32, True), (BIASED, 41, False), (APART, 20, True)):
        sizes = Sizes(21, 2, 3, hidden, 24)
        run(program, "eoi", sizes, block=32, routing="holes", depth=16, skip=skip, swap=swap, persistent=persistent)


ADDED = "mm(1, gelu(cols(mm(0, x) + b(0), 0, {j}, 2)) * (cols(mm(0, x) + b(0), 1, {j}, 2) + 1.0) * w)"
GATE, UP = (f"cols(mm(0, x), {at}, {{j}}, 2) + cols(b(0), {at}, {{j}}, 2)" for at in (0, 1))
BOTH = f"mm(1, clamp({GATE}, None, 1.0) * ({UP})) + b(1)"
SPREAD = "mm(1, silu(cols(mm(0, w * x), 0, {i}, 1)) * cols(mm(0, w * x), {i}, {j}, 1))"
TRAINED = {name: PROGRAMS[name] for name in ("halves", "swapped halves", "pairs", "apart", "one")}
TRAINED |= {"added": ADDED, "both biases": BOTH, "weighted rows": SPREAD}


@CASES.add(*((name, layout) for i, name in enumerate(TRAINED) for layout in (LAYOUTS[0], LAYOUTS[1 + i % 3])))
def gradients(name: str, layout: str) -> None:
    run_backward(TRAINED[name], layout, SMALL, routing="holes", seed=5)


@CASES.add(*((layout,) for layout in LAYOUTS))
def gradients_of_some_columns_at_a_time(layout: str) -> None:
    with mock.patch.object(configs_backward, "read_columns", return_value=8):
        run_backward(HALVES, layout, Sizes(12, 2, 3, 20, 16))


@CASES.add(*((name,) for name in FUNCTION_PROGRAMS))
def gradients_of_functions(name: str) -> None:
    run_backward(FUNCTION_PROGRAMS[name], "eio", Sizes(5, 2, 3, 8, 16))


ODD = ((0, 2, 4, 16, 16), (1, 1, 1, 16, 16), (33, 1, 5, 20, 12), (90, 2, 3, 40, 24), (72, 1, 2, 48, 32))


@CASES.add(*((sizes, routing) for routing in ("random", "one") for sizes in ODD))
def gradients_of_odd_sizes(sizes: tuple[int, ...], routing: str) -> None:
    run_backward(HALVES, "eoi", Sizes(*sizes), routing=routing)


@CASES.add()
def gradients_in_other_dtypes() -> None:
    run_backward(HALVES, "eoi", SMALL, dtype=torch.bfloat16)
    run_backward(APART, "oi*", SMALL, dtype=torch.float16)


TWO_HALVES = HALVES.format(i=16, j=32)


def summed(provider: str, x: Any, w: Any, w13: Any, w2: Any, ids: Any, text: str = TWO_HALVES) -> Any:
    order, offsets = counting_sort(ids, w2.shape[0])
    texts = (text, "eoi,eoi", "", 2)
    return torch.ops.moe_compile.permute_experts_combine.default(x, order, offsets, None, [w13, w2], [], *texts, w, x.dtype, provider)


def tensors(tokens: int) -> tuple[list[Any], Any]:
    """(x, weights of the sum, both weights), ids"""
    g = torch.Generator().manual_seed(tokens)
    shapes, ids = ((tokens, 16), (tokens, 2), (4, 32, 16), (4, 16, 16)), torch.randint(0, 4, (tokens, 2), generator=g)
    return [torch.randn(shape, generator=g).to(where()).requires_grad_() for shape in shapes], ids.to(where())


def where() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def alike(got: Any, wanted: Any) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@CASES.add((7,), (0,))
def fakes_of_training(tokens: int) -> None:
    """Shapes and dtypes of what the forward saves (products and the plan), of what stands between, and of gradients."""
    (x, w, w13, w2), ids = tensors(tokens)
    order, offsets = counting_sort(torch.where(ids == 1, -1, ids), 4)
    args = tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in (x, order, offsets))
    weights = [w13.detach(), w2.detach()]
    rest = (*args, None, weights, [], TWO_HALVES, "eoi,eoi", "", 2, w.detach(), x.dtype, "triton", [True, False, True, True, True])

    def check(op: Any, *own: Any) -> Any:
        torch.library.opcheck(op.overload, own, test_utils=("test_schema", "test_faketensor"))
        return op.overload(*own)

    out, saved = check(experts_combine.SAVING_OP, *rest)
    assert [each.is_floating_point() for each in saved] == [True, False]
    carried = check(experts_two_steps.REVERSE_OP, torch.ones_like(out), saved, *rest)
    check(experts_two_steps.GRADIENTS_OP, carried, saved[-1:], *rest)


@CASES.add()
def gradients_of_a_compiled_graph() -> None:
    """Both halves of the backward are traced, with a number of tokens and widths that are symbols."""
    compiled = torch.compile(lambda *given: summed("triton", *given), backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (5, 40):
        given, ids = tensors(tokens)
        wanted = torch.autograd.grad(summed("reference", *given, ids).square().sum(), given)
        alike(torch.autograd.grad(compiled(*given, ids).square().sum(), given), wanted)


@CASES.add()
def gradients_again_and_of_some() -> None:
    given, ids = tensors(7)
    wanted = torch.autograd.grad(summed("reference", *given, ids).square().sum(), given)
    loss = summed("triton", *given, ids).square().sum()
    for _ in range(2):
        alike(torch.autograd.grad(loss, given, retain_graph=True), wanted)
    for at, own in enumerate(given):  # what is asked for alone, and what alone has a gradient
        alike(torch.autograd.grad(loss, [own], retain_graph=True), wanted[at : at + 1])
        frozen = [each if each is own else each.detach() for each in given]
        alike(torch.autograd.grad(summed("triton", *frozen, ids).square().sum(), [own]), wanted[at : at + 1])
    again = torch.utils.checkpoint.checkpoint(summed, "triton", *given, ids, use_reentrant=False)
    alike(torch.autograd.grad(again.square().sum(), given), wanted)


UNREAD = ("silu(cols(mm(0, x), 0, 16, 1)) * cols(mm(0, x), 32, 48, 1)", "silu(cols(mm(0, x), 16, 32, 1))", "cols(mm(0, x), 1, 33, 2)")


@CASES.add(*((hidden,) for hidden in UNREAD))
def gradients_of_columns_that_are_not_read(hidden: str) -> None:
    """They are zero, and nothing else is touched by them."""
    given, ids = tensors(9)
    g = torch.Generator().manual_seed(0)
    given[2] = torch.randn((4, 48, 16), generator=g).to(where()).requires_grad_()
    text = f"mm(1, {hidden})"
    wanted = torch.autograd.grad(summed("reference", *given, ids, text).square().sum(), given)
    alike(torch.autograd.grad(summed("triton", *given, ids, text).square().sum(), given), wanted)


AGAIN = ("silu(cols(mm(0, x), 0, 16, 1)) * cols(mm(0, x), 8, 24, 1)", "cols(mm(0, x), 0, 16, 1) * cols(mm(0, x), 0, 1, 1)")


@CASES.add(*((hidden,) for hidden in AGAIN))
def gradients_of_columns_that_are_read_again(hidden: str) -> None:
    """They are refused, before anything runs; the forward is not."""
    given, ids = tensors(9)
    text = f"mm(1, {hidden})"
    alike([summed("triton", *(each.detach() for each in given), ids, text)], [summed("reference", *given, ids, text)])
    assert "reads some again" in str(launch_backward.unfit(typical_layers(parse(text), torch.float32), parse(text)))
    with pytest.raises(ValueError, match="choose another provider"):
        summed("triton", *given, ids, text)


@CASES.add()
def gradients_of_weights_of_two_layers() -> None:
    """A weight or a bias that both layers read is refused in training, and right without."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).to(where()) for s in ((9, 16), (4, 16, 16), (4, 16)))
    order, offsets = counting_sort(torch.randint(0, 4, (9, 2), generator=g).to(where()), 4)
    for text, biases in (("mm(0, relu(mm(0, x)))", []), ("mm(1, relu(mm(0, x) + b(0))) + b(0)", [b])):
        weights = [w, w.flip(0)] if biases else [w]
        texts = (text, ",".join("eoi" for _ in weights), "eo" if biases else "", 2)

        def run(provider: str, x: Any) -> Any:
            args = (x, order, offsets, None, weights, biases, *texts, None, None)  # noqa: B023
            return torch.ops.moe_compile.permute_experts_combine.default(*args, provider)

        alike([run("triton", x)], [run("reference", x)])
        with pytest.raises(ValueError, match="weights and biases of their own"):
            run("triton", x.clone().requires_grad_())


@CASES.add()
def products_are_freed_on_the_way_back() -> None:
    """What the forward saved is gone when weights get gradients, and what the last layer's are made of when the first one's do."""
    given, ids = tensors(7)
    kernels = experts_triton.KERNELS
    saving, reverse, gradients_of = (kernels[name] for name in (experts.COMBINED_SAVING, experts.REVERSE, experts.GRADIENTS))
    kept: list[list[Any]] = [[], []]
    seen: list[list[bool]] = []

    def remembered(at: int, tensors: Any) -> Any:
        kept[at].extend(weakref.ref(each) for each in tensors)

    def saved(*args: Any) -> Any:
        found = saving(*args)
        remembered(0, [each for each in found[1] if each.is_floating_point()])  # not the plan, which all of them read
        return found

    def reversed_(*args: Any) -> Any:
        found = reverse(*args)
        remembered(1, found[:2])
        return found

    def last_or_first(*args: Any) -> Any:
        seen.append([all(each() is None for each in own) for own in kept])
        return gradients_of(*args)

    spies = {experts.COMBINED_SAVING: saved, experts.REVERSE: reversed_, experts.GRADIENTS: last_or_first}
    with mock.patch.dict(kernels, spies):
        summed("triton", *given, ids).sum().backward()
    assert all(kept)
    assert seen == [[True, False], [True, True]], seen


@CASES.add()
def tiles_that_do_not_fit() -> None:
    """Smaller ones are taken where a device has less shared memory, and an error says so where none fit."""
    from triton.runtime.errors import OutOfResources

    tried: list[configs.Tiles] = []
    started = launch._launch

    def refuse(layer: object, tiles: configs.Tiles, *args: object) -> None:
        tried.append(tiles)
        if tiles.depth > least:
            raise OutOfResources(300000, 232448, "shared memory")
        started(layer, tiles, *args)  # type: ignore[arg-type]

    with mock.patch.object(launch, "_launch", refuse):
        least = 32
        run(HALVES, "eoi", SMALL, depth=64, stages=4)
        assert tried[0] != tried[-1]
        assert tried[-1].depth == 16 or tried[-1].depth == 32
        least, before = 0, len(tried)
        with pytest.raises(RuntimeError, match="shared memory"):
            run(HALVES, "eoi", Sizes(8, 2, 4, 24, 16), depth=64)
        assert len(tried) > before + 3


test_in_interpreter = CASES.test()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES.functions)
def test_on_a_gpu(name: str) -> None:
    CASES.functions[name]()


LARGE = ((300, 8, 16, 256, 192), (1000, 2, 8, 512, 384), (700, 4, 4, 320, 160), (64, 8, 128, 256, 128), (2000, 2, 3, 136, 72))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", LARGE)
@pytest.mark.parametrize("layout", ["eoi", "eio", "oi*"])
@pytest.mark.parametrize("name", ["halves", "biased", "apart", "one"])
def test_many_rows_on_a_gpu(name: str, layout: str, sizes: tuple[int, ...]) -> None:
    run(PROGRAMS[name], layout, Sizes(*sizes), dtype=torch.bfloat16, routing="holes" if sizes[1] == 2 else "random")


if __name__ == "__main__":
    CASES.main()
