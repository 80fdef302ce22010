"""Forwards that put plain values into attributes of modules: programs do so too, unless code may have read what was there before."""

from __future__ import annotations

import enum
import time

import pytest
import torch
from probed_blocks import Asks, E, H
from test_probing import assert_same, compiled, tokens
from torch import Tensor, nn

from moe_compile.probing.errors import NotProbed
from moe_compile.probing.probe import program_for


class Gate(nn.Linear):
    """Keeps the dtype that it was given, and gives its scores in it, as Switch's router does."""

    def forward(self, x: Tensor) -> Tensor:
        self.input_dtype = x.dtype
        return super().forward(x.float()).to(self.input_dtype)


class Writes(Asks):
    """`changed` writes; `kept` names what it leaves behind."""

    kept: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(H, E)
        self.norm = nn.LayerNorm(H)

    def changed(self, out: Tensor, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return out


class Sizes(Writes):
    """Numbers made of the number of tokens, written and then used."""

    kept = ("tokens", "room", "limits")

    def changed(self, out, x, w, ids):
        self.tokens = x.shape[0]
        self.room = 2 * self.tokens + 1
        self.limits = (self.room, "rows", None)
        return out * (self.room / self.limits[0])


class Tensors(Writes):
    """A tensor of its own that is used again."""

    def changed(self, out, x, w, ids):
        self.last_weights = w.detach()
        return out * self.last_weights.sum(-1, keepdim=True)


class BeforeTheCall(Writes):
    """What is written is read by torch's own code at once: first one value, then another."""

    def changed(self, out, x, w, ids):
        self.norm.eps = 1.0
        out = self.norm(out)
        self.factor = 2.0
        return out * self.factor


def written(x: Tensor) -> dict[type[Writes], dict[str, object]]:
    room = 2 * x.shape[0] + 1
    return {Writes: {}, Sizes: {"tokens": x.shape[0], "room": room, "limits": (room, "rows", None)}, BeforeTheCall: {"factor": 2.0}}


@pytest.mark.parametrize("cls", [Writes, Sizes, BeforeTheCall])
def test_what_the_forward_writes_the_program_writes(cls):
    """From the first call on, when none of it is there yet, and for other numbers of tokens."""
    torch.manual_seed(0)
    module = cls().eval()
    fast, report = compiled(module, tokens(12))
    assert any("captured from a recording" in note for note in report.notes), str(report)
    assert report.rewritten, str(report)
    for n in (5, 40):
        with torch.no_grad():
            fast(tokens(n))
        assert module.gate.input_dtype is torch.float32
        assert {name: getattr(module, name) for name in written(tokens(n))[cls]} == written(tokens(n))[cls]
        assert_same(fast, module, tokens(n, seed=n))


def test_recording_leaves_no_attribute_behind():
    module = Sizes().eval()
    program = program_for(module, (tokens(12),), {})
    assert not {"tokens", "room", "limits"} & set(vars(module))
    assert "input_dtype" not in vars(module.gate)
    assert {name for _, name in program.written} == {"tokens", "room", "limits", "input_dtype"}


def test_a_tensor_is_kept_that_the_code_reads_again():
    module = Tensors().eval()
    program = program_for(module, (tokens(12),), {})
    out = program.run(module, (tokens(7),), {})
    got = module.last_weights
    assert torch.allclose(out, module(tokens(7)), atol=1e-6)
    assert torch.allclose(got, module.last_weights, atol=1e-6)


def test_what_is_asked_for_may_come_later():
    """An attribute that was not there is one of the conditions."""

    class Optional(Writes):
        def changed(self, out, x, w, ids):
            return out * self.bonus if hasattr(self, "bonus") else out

    module = Optional().eval()
    program = program_for(module, (tokens(12),), {})
    assert program.fits(module, (tokens(12),), {})
    module.bonus = 3.0
    assert not program.fits(module, (tokens(12),), {})


class ReadsFirst(Writes):
    def changed(self, out, x, w, ids):
        out, self.scale = out * self.scale, self.scale * 2
        return out


class AsksFirst(Writes):
    def changed(self, out, x, w, ids):
        out = out if hasattr(self, "started") else out * 2
        self.started = True
        return out


class GetsFirst(Writes):
    def changed(self, out, x, w, ids):
        out = out * getattr(self, "factor", 2.0)
        self.factor = 1.0
        return out


class ReadsItsTable(Writes):
    def changed(self, out, x, w, ids):
        out = out * vars(self).get("factor", 2.0)
        self.factor = 1.0
        return out


class AfterTheCall(Writes):
    """Torch's own code has read what is written now: the next call gives something else."""

    def changed(self, out, x, w, ids):
        out = self.norm(out)
        self.norm.eps = self.norm.bias.shape[0] * 1.0
        return out


class Clock(Writes):
    def changed(self, out, x, w, ids):
        self.started = time.perf_counter()
        return out


class Counts(Writes):
    """A number that only the data tells."""

    def changed(self, out, x, w, ids):
        self.largest = int(ids.flatten().bincount(minlength=E).max())
        return out


class AList(Writes):
    def changed(self, out, x, w, ids):
        self.shapes = [tuple(x.shape)]
        return out


class AnEnum(Writes):
    """A number of a class that Python code does not show."""

    class Mode(enum.IntEnum):
        FAST = 1

    def changed(self, out, x, w, ids):
        self.mode = self.Mode.FAST
        return out


class InATokenLoop(Writes):
    def changed(self, out, x, w, ids):
        rows = torch.zeros_like(out)
        for t in range(x.shape[0]):
            rows[t] = out[t] * 2
            self.token = t
        return rows


def test_the_last_token_writes_last():
    """A loop over tokens that writes is no loop over any number of them."""
    module = InATokenLoop().eval()
    program = program_for(module, (tokens(6),), {})
    assert not program.fits(module, (tokens(5),), {})
    out = program.run(module, (tokens(6, seed=1),), {})
    assert module.token == 5
    assert torch.allclose(out, module(tokens(6, seed=1)), atol=1e-6)


@pytest.mark.parametrize(("cls", "reason"), [
    (ReadsFirst, "leaves something behind in scale"),
    (AsksFirst, "leaves something behind in started"),
    (GetsFirst, "leaves something behind in factor"),
    (ReadsItsTable, "leaves something behind in factor"),
    (AfterTheCall, "leaves something behind in norm.eps"),
    (Clock, "attribute started of the program is off"),
    (Counts, "leaves something behind in largest"),
    (AList, "leaves something behind in shapes"),
    (AnEnum, "leaves something behind in mode"),
])  # fmt: skip
def test_other_attributes_are_left_alone(cls, reason):
    torch.manual_seed(0)
    with pytest.raises(NotProbed, match=reason):
        program_for(cls().eval(), (tokens(12),), {})
