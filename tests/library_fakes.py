"""Puts stand-ins for DeepEP (V1, V2) and pplx-kernels where the adapters look for them, and what ranks then run in tests."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import exchange_cases as cases
import torch
import torch.distributed as dist
from library_base import ALIVE, MADE, everyone
from library_deepep import Buffer, Config
from library_elastic import ElasticBuffer, EPHandle
from library_pplx import AllToAll

from moe_compile.ops import experts_batched, payload, quantize_dispatch, registry
from moe_compile.ops.comm import deepep_ht, deepep_ll, deepep_v2, exchange, libraries, library_exchange, pplx

BATCHED = ("deepep_ll", "pplx")
MODULES = {"deepep_ht": deepep_ht, "deepep_ll": deepep_ll, "deepep_v2": deepep_v2, "pplx": pplx}


# ---------------------------------------------------------------- installing
def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__file__ = f"/fake/{name}.py"
    made.__dict__.update(attributes)
    return made


def deep_ep(elastic: bool = True) -> types.ModuleType:
    more = {"ElasticBuffer": ElasticBuffer, "EPHandle": EPHandle, "__version__": "2.1.0"} if elastic else {}
    return module("deep_ep", Buffer=Buffer, Config=Config, topk_idx_t=torch.int64, **more)


def pplx_kernels() -> types.ModuleType:
    entries = types.SimpleNamespace(all_to_all_intranode_create=len)
    return module("pplx_kernels", AllToAll=AllToAll, ops=types.SimpleNamespace(_ops=entries))


@contextlib.contextmanager
def installed(*modules: types.ModuleType) -> Iterator[None]:
    """The modules can be imported, until the end of the block. What else is imported meanwhile stays."""
    before = {each.__name__: sys.modules.get(each.__name__) for each in modules}
    sys.modules.update({each.__name__: each for each in modules})
    libraries.forget()
    try:
        yield
    finally:
        for name, found in before.items():
            sys.modules.pop(name, None)
            if found is not None:
                sys.modules[name] = found
        libraries.forget()


# ---------------------------------------------------------------- what ranks run
def _close(got: Any, wanted: Any, limit: float, what: str, close: Any = cases._close) -> None:
    """With few tokens of 16 columns in bfloat16 the rounding of one row decides."""
    close(got, wanted, 4 * limit, what)


def layers(provider: str, seed: int, routings: tuple[str, ...], backward: bool, **fields: Any) -> int:
    """The routings with several numbers of tokens, as stages with gradients or as one op; then everything is given back, twice."""
    done = 0
    with installed(deep_ep(), pplx_kernels()), mock.patch.object(cases, "_close", _close):
        for routing in routings:
            for tokens in ([5, 3, 0, 7], [1, 0, 2, 1], [0], [17, 4, 9, 1]):
                for top_k, num_experts in ((2, 8), (1, 4), (4, 4)):
                    cases.one_layer(provider, tokens, top_k, num_experts, routing, seed + done, torch.bfloat16, backward=backward, **fields)
                    done += 1
        shared = len(ALIVE)
        exchange.destroy_all()
        exchange.destroy_all()
        assert not ALIVE
        assert not library_exchange._lent
    return shared


def plain(got: Any, batch: experts_batched.Batch, dtype: torch.dtype) -> Any:
    """The rows, without kernels."""
    return payload.dequantize(got.rows, got.scales, dtype) if got.scales.numel() else got.rows


def rows_in_place(provider: str, quant: str) -> None:
    """Experts that take the batched format get rows and counts, and their results go back from the same places."""
    setup = cases.setup_for(512, 2, 8, torch.bfloat16, quant=quant, max_tokens=17, ids_valid=True)
    shared, g = torch.Generator().manual_seed(7), torch.Generator().manual_seed(dist.get_rank())
    tokens, local = (5, 17, 0, 1)[dist.get_rank()], 8 // dist.get_world_size()
    x, w = torch.randn((tokens, 512), generator=g).bfloat16(), torch.rand((tokens, 2), generator=g)
    ids = cases.ids_for(tokens, 2, 8, "random", g)
    full = [torch.randn(s, generator=shared) / s[1] ** 0.5 for s in ((8, 512, 8), (8, 8, 512))]
    mine = [each[dist.get_rank() * local :][:local].bfloat16() for each in full]
    seen: list[experts_batched.Batch] = []

    def kernel(call: Any, batch: experts_batched.Batch) -> Any:
        seen.append(batch)
        y = torch.full((call.x.shape[0], 512), float("nan")).bfloat16()
        for e, count in enumerate(batch.counts_E.tolist()):
            at = slice(e * batch.capacity, e * batch.capacity + count)
            y[at] = (torch.relu(call.x[at].float() @ mine[0][e].float()) @ mine[1][e].float()).bfloat16()
        return y

    own = registry.Provider("in_place", "experts", {experts_batched.NAME: kernel}, cost=lambda problem: 1.0)
    with (
        installed(deep_ep(), pplx_kernels()),
        mock.patch.object(registry, "get", lambda stage, name, get=registry.get: own if name == "in_place" else get(stage, name)),
        mock.patch.object(experts_batched, "plain_rows", plain),
    ):
        out = cases.fused_layer(provider, x, ids, w, mine, setup, "in_place")
        exchange.destroy_all()
    (batch,), sent = seen, sum(len(each) for each in everyone(ids)) * 2
    assert sum(everyone(int(batch.counts_E.sum()))) == sent
    assert int(batch.counts_E.sum()) <= batch.most <= local * batch.capacity
    assert batch.expected == max(1, 2 * tokens)
    _close(out, cases.reference(x, ids, w, full), 6e-2 if quant == "none" else 0.2, provider)


def quantised(provider: str) -> None:
    """Rows of fp8: expert e multiplies by e + 1."""
    setup = cases.setup_for(512, 2, 8, torch.bfloat16, quant="fp8", max_tokens=17, ids_valid=True)
    g = torch.Generator().manual_seed(dist.get_rank())
    tokens = (5, 17, 0, 1)[dist.get_rank()]
    x, w = torch.randn((tokens, 512), generator=g).bfloat16(), torch.rand((tokens, 2), generator=g)
    ids = cases.ids_for(tokens, 2, 8, "random", g)
    with installed(deep_ep(), pplx_kernels()):
        own = exchange.exchange_of(provider, setup.text, "cpu")
        got = own.dispatch(x, ids, [] if provider in BATCHED else [w])
        assert got.rows.dtype == torch.float8_e4m3fn
        assert got.scales.shape == (len(got.rows), 4)
        rows = payload.dequantize(got.rows, got.scales, torch.float32)
        first = dist.get_rank() * (8 // own.world)
        factors = torch.where(got.ids >= 0, got.ids + first + 1, 0) * (1 if provider in BATCHED else got.weights[0])
        y = torch.where((got.ids >= 0).any(1, keepdim=True), rows * factors.sum(1, keepdim=True), 0).bfloat16()
        out = own.collect(y, got.handle, torch.bfloat16, w if provider in BATCHED else None)
        exchange.destroy_all()
    _close(out, x.double() * (w.double() * (ids + 1)).sum(1, keepdim=True), 2e-2, provider)


def as_wide_as_slots() -> None:
    """V2's sum of rows that are as wide as a token has slots."""
    setup = cases.setup_for(256, 2, 8, torch.bfloat16, max_tokens=4)
    local = 8 // dist.get_world_size()
    with installed(deep_ep()):
        own = exchange.exchange_of("deepep_v2", setup.text, "cpu")
        got = own.dispatch(torch.zeros(1, 256).bfloat16(), torch.tensor([[0, local]]), [])
        out = own.collect(torch.full((len(got.ids), 2), 1.0 + dist.get_rank()).bfloat16(), got.handle, torch.bfloat16)
        exchange.destroy_all()
    assert out.tolist() == [[3.0, 3.0]]  # from ranks 0 and 1


def handles_like_fakes(provider: str, **fields: bool) -> None:
    """The op's fake gives tensors of the shapes and dtypes that the exchange gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    setup = cases.setup_for(16, 2, 8, torch.bfloat16, max_tokens=8, **fields)
    x, ids = torch.randn(5, 16).bfloat16(), torch.tensor([[0, 7], [3, 1], [2, 6], [5, 4], [1, 0]])
    weights = [] if MODULES[provider].PROVIDER.kernels.get(exchange.SLOTS) else [torch.rand(5, 2), torch.rand(5, 2).bfloat16()]
    with installed(deep_ep(), pplx_kernels()):
        got = quantize_dispatch.OP.overload(x, ids, 8, "none", provider, weights, setup.text)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fake = [mode.from_tensor(each) for each in (x, ids, *weights)]
            like = quantize_dispatch.OP.overload(*fake[:2], 8, "none", provider, fake[2:], setup.text)
        for real, copy in zip(flat(got), flat(like), strict=True):
            assert (real.dtype, real.dim()) == (copy.dtype, copy.dim()), (provider, real.shape, copy.shape, real.dtype, copy.dtype)
            assert all(not isinstance(b, int) or a == b for a, b in zip(real.shape, copy.shape, strict=True)), (real.shape, copy.shape)
        if weights:  # a second set of weights came along, in its own dtype
            first, second = got[5]
            everything = torch.cat(everyone(torch.cat([w.float() for w in weights], 1)))
            pairs = torch.cat([first, second.float()], 1)[(first != 0).any(1)]
            for row in pairs.tolist():
                assert any(all(a in (0.0, b) for a, b in zip(row, each, strict=True)) for each in everything.tolist())
        exchange.destroy_all()


def flat(things: Any) -> list[Any]:
    return [each for thing in things for each in (thing if isinstance(thing, list | tuple) else [thing])]


def an_object_is_shared(provider: str) -> tuple[int, int, int]:
    """(objects made for two top_k and two widths, alive after one of three exchanges is gone, alive at the end)."""
    MADE.clear()
    with installed(deep_ep(), pplx_kernels()):
        setups = [cases.setup_for(h, k, 8, torch.bfloat16, max_tokens=8, ids_valid=True) for h, k in ((512, 2), (512, 3), (1024, 2))]
        found = [exchange.exchange_of(provider, setup.text, "cpu") for setup in setups]
        made = len(MADE)
        found[0].destroy()
        found[0].destroy()
        alive = len(ALIVE)
        exchange.destroy_all()
        return made, alive, len(ALIVE)


def raised(own: Any, text: str) -> None:
    with own.calling("dispatch"):
        raise RuntimeError(text)


def stopped() -> bool:
    raise RuntimeError("CUDA error: unspecified launch failure")


def what_goes_wrong(provider: str) -> dict[str, str]:
    """Messages of what an adapter refuses while it runs."""
    told: dict[str, str] = {}

    def note(what: str, call: Any) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            told[what] = f"{type(error).__name__}: {error}"

    x, ids = torch.randn(3, 256).bfloat16(), torch.tensor([[0, 1], [2, 3], [1, 7]])
    setup = cases.setup_for(256, 2, 8, torch.bfloat16, max_tokens=4, ids_valid=True)
    libraries.forget()
    note("no library", lambda: exchange.exchange_of(provider, setup.text, "cpu"))
    with installed(deep_ep(), pplx_kernels()):
        own: Any = exchange.exchange_of(provider, setup.text, "cpu")
        got = own.dispatch(x, ids, [])
        note("float32 sum", lambda: own.collect(got.rows.float(), got.handle, torch.float32))
        note("wide", lambda: own.collect(got.rows.repeat(1, 2), got.handle, torch.bfloat16))
        note("send", lambda: own.send(x, got.handle))
        if provider == "pplx":
            note("twice", lambda: own.dispatch(x, ids, []))
        own.collect(got.rows, got.handle, torch.bfloat16)
        if provider == "pplx":
            note("collect twice", lambda: own.collect(got.rows, got.handle, torch.bfloat16))
        note("tokens", lambda: own.dispatch(torch.zeros(9, 256).bfloat16(), ids.repeat(3, 1), []))
        note("refused", lambda: own.dispatch(x[:, :3], ids, []) if provider == "deepep_v2" else None)
        for what in ("DeepEP error: CPU recv timeout", "CUDA error: unspecified launch failure"):
            note(what, lambda what=what: raised(own, what))
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", stopped), mock.patch.object(own, "device", torch.device("cuda")):
            note("device dispatch", lambda: own.dispatch(x, ids, []))
            note("device combine", lambda: own.collect(got.rows, got.handle, torch.bfloat16))
            note("device check", exchange.check_all)
        own.destroy()
        note("destroyed", lambda: own.dispatch(x, ids, []))
        exchange.destroy_all()
    return told
