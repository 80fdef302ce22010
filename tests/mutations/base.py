"""A style of MoE code with a switch: `mutation` names the one thing that differs from the original.

`Family` holds the parameters and the hooks that every style shares (router, weights, activation, what enters
and leaves an expert).  A style calls them with `e`, the expert: an int in loops, a tensor of ids elsewhere.
H equals I on purpose, so that a transposed or swapped weight is a wrong number and not a shape error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H = I = 16  # noqa: E741
E, K, T = 4, 2, 16  # T equals H and the batch equals K: sizes alone tell no axis from another
ODD = 2  # the expert that one-expert mutations change

Expert = int | Tensor

ROUTER = (
    "softmax_over_tokens", "sigmoid_scores", "temperature", "smallest_scores", "biased_choice",
    "biased_choice_and_weight", "renorm_over_tokens", "no_renorm", "eps_large", "neighbour_slot",
    "neighbour_token_weight", "weights_scaled", "weights_squared", "weights_detached", "weights_bf16",
    "weights_clamped", "weights_thresholded", "weights_one", "row_masked", "slot_dropped", "capacity",
    "ids_shifted", "ids_reversed", "ids_of_other_gate", "ids_next_token", "slot_ids_shifted",
    "duplicate_slots",
)  # fmt: skip

EXPERT = (
    "expert_rotated", "experts_share", "down_rotated", "bias_rotated", "bias_dropped_one",
    "bias_dropped_all", "transposed_all", "transposed_one", "weight_negated_one", "weight_detached",
    "halves_swapped", "slice_off_by_one", "halves_interleaved", "act_all", "act_one", "clamp_all",
    "clamp_one", "ungated_one", "bf16_inside", "bf16_inside_one", "hidden_detached", "scale_inside",
    "scale_inside_one", "scale_outside_one", "scale_by_index", "residual_inside", "residual_one",
    "relu_out", "x_detached", "x_next_token", "x_scaled_one", "no_grad_one", "constant_added",
    "dropped_feature",
)  # fmt: skip

# Mutations that change nothing, or nothing but the gradient.
SAME = frozenset({"reversed_order", "unstable_sort", "weights_sorted_twice"})
GRADIENT_ONLY = frozenset({"weights_detached", "weight_detached", "hidden_detached", "x_detached", "no_grad_one"})
# Mutations that round: another order of summation may flip a rounding, so only closeness can be asked for.
ROUNDING = frozenset({"weights_bf16", "bf16_inside", "bf16_inside_one", "accumulator_bf16"})


class Family(nn.Module):
    """Parameters: gate, other_gate [E, H]; w1 [E, 2I, H], b1 [E, 2I], w2 [E, H, I], b2 [E, H]."""

    own: tuple[str, ...] = ()  # mutations of this style's structure
    without: frozenset[str] = frozenset()  # common mutations that it cannot express
    dtype = torch.float32
    biases = True
    interleaved = False

    def __init__(self, mutation: str | None = None) -> None:
        super().__init__()
        self.mutation = mutation
        self.gate, self.other_gate = nn.Linear(H, E), nn.Linear(H, E)
        self.register_buffer("choice_bias", torch.linspace(-0.2, 0.2, E))
        self.make_experts()

    def make_experts(self) -> None:
        self.w1, self.b1 = nn.Parameter(torch.empty(E, 2 * I, H)), nn.Parameter(torch.empty(E, 2 * I))
        self.w2, self.b2 = nn.Parameter(torch.empty(E, H, I)), nn.Parameter(torch.empty(E, H))

    @classmethod
    def mutations(cls) -> list[str]:
        """All that apply to this style."""
        without = cls.without if cls.biases else cls.without | {m for m in EXPERT if m.startswith("bias_")}
        return [m for m in (*ROUTER, *EXPERT, *cls.own) if m not in without]

    # ---- router

    def scores(self, x_TH: Tensor) -> Tensor:
        logits, m = self.gate(x_TH), self.mutation
        if m == "softmax_over_tokens":
            return logits.softmax(0)
        if m == "sigmoid_scores":
            return logits.sigmoid()
        return (logits * 0.5 if m == "temperature" else logits).softmax(-1)

    def choose(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        p, m = self.scores(x_TH), self.mutation
        if m == "biased_choice":
            ids = (p + self.choice_bias).topk(K, dim=-1)[1]
            return p.gather(1, ids), ids
        if m == "biased_choice_and_weight":
            p = p + self.choice_bias
        return torch.topk(p, K, dim=-1, largest=m != "smallest_scores")

    def normalised(self, w: Tensor) -> Tensor:
        m = self.mutation
        if m == "no_renorm":
            return w
        if m == "eps_large":
            return w / (w.sum(-1, keepdim=True) + 0.1)
        return w / w.sum(0 if m == "renorm_over_tokens" else -1, keepdim=True)

    def weighed(self, w: Tensor, ids: Tensor) -> Tensor:
        m = self.mutation
        changed: dict[str, Callable[[], Tensor]] = {
            "neighbour_slot": lambda: w.flip(-1),
            "neighbour_token_weight": lambda: w.roll(1, 0),
            "weights_scaled": lambda: w * 1.5,
            "weights_squared": lambda: w * w,
            "weights_detached": w.detach,
            "weights_bf16": lambda: w.bfloat16().to(w.dtype),
            "weights_clamped": lambda: w.clamp(max=0.6),
            "weights_thresholded": lambda: w * (w > 0.4),
            "weights_one": lambda: torch.ones_like(w),
            "row_masked": lambda: w.masked_fill((torch.arange(w.shape[0]) == 3).unsqueeze(-1), 0.0),
            "slot_dropped": lambda: w * torch.tensor([1.0, 0.0], dtype=w.dtype),
            "capacity": lambda: w * self.within_capacity(ids),
        }
        return changed[m]() if m in changed else w

    def within_capacity(self, ids: Tensor) -> Tensor:
        hot = F.one_hot(ids.reshape(-1), E)
        rank = ((hot.cumsum(0) - 1) * hot).sum(-1).view_as(ids)
        return rank < 3

    def chosen(self, x: Tensor, ids: Tensor) -> Tensor:
        m = self.mutation
        changed: dict[str, Callable[[], Tensor]] = {
            "ids_shifted": lambda: (ids + 1) % E,
            "ids_reversed": lambda: E - 1 - ids,
            "ids_of_other_gate": lambda: self.other_gate(x).topk(K, dim=-1)[1],
            "ids_next_token": lambda: ids.roll(-1, 0),
            "slot_ids_shifted": lambda: (ids + torch.arange(K)) % E,
            "duplicate_slots": lambda: ids[:, :1].expand(-1, K),
        }
        return changed[m]() if m in changed else ids

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.choose(x_TH)
        return self.weighed(self.normalised(w), ids), self.chosen(x_TH, ids)

    # ---- weights

    def index(self, j: int, bias: bool) -> list[int]:
        """Which expert's parameter stands at each place."""
        m = self.mutation
        if m == "expert_rotated" or (m == "down_rotated" and j == 1 and not bias) or (m == "bias_rotated" and bias):
            return [(e + 1) % E for e in range(E)]
        if m == "experts_share":
            return [min(e, E - 2) for e in range(E)]
        return list(range(E))

    def of_one(self, w: Tensor, e: int, j: int) -> Tensor:
        """A change of one expert's matrix [out, in]."""
        m = self.mutation
        if j == 1 and (m == "transposed_all" or (m == "transposed_one" and e == ODD)):
            return w.t()
        if m == "weight_negated_one" and e == ODD and j == 1:
            return -w
        return w.detach() if m == "weight_detached" and j == 0 else w

    def weight(self, j: int, e: int) -> Tensor:
        """Matrix j [out, in] of expert e."""
        return self.of_one((self.w1, self.w2)[j][self.index(j, False)[e]], e, j)

    def weights(self, j: int) -> Tensor:
        """All matrices j, [E, out, in]."""
        w, index, m = (self.w1, self.w2)[j], self.index(j, False), self.mutation
        w = w if index == list(range(E)) else w[index]
        if m in ("transposed_one", "weight_negated_one") and j == 1:
            return torch.cat([w[:ODD], self.of_one(w[ODD], ODD, j).unsqueeze(0), w[ODD + 1 :]])
        if m == "transposed_all" and j == 1:
            return w.transpose(1, 2)
        return w.detach() if m == "weight_detached" and j == 0 else w

    def bias(self, j: int, e: int) -> Tensor | None:
        """Bias j of expert e, None where there is none."""
        m = self.mutation
        if not self.biases or (j == 1 and (m == "bias_dropped_all" or (m == "bias_dropped_one" and e == ODD))):
            return None
        return (self.b1, self.b2)[j][self.index(j, True)[e]]

    def bias_table(self, j: int) -> Tensor | None:
        """All biases j, [E, out]."""
        m = self.mutation
        if not self.biases or (j == 1 and m == "bias_dropped_all"):
            return None
        b, index = (self.b1, self.b2)[j], self.index(j, True)
        b = b if index == list(range(E)) else b[index]
        return b * (torch.arange(E) != ODD).unsqueeze(-1) if m == "bias_dropped_one" and j == 1 else b

    # ---- one expert

    def at_odd(self, e: Expert, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
        """yes() for the odd expert, no() for the others."""
        if isinstance(e, int):
            return yes() if e == ODD else no()
        return torch.where((e == ODD).unsqueeze(-1), yes(), no())

    def entering(self, x: Tensor, e: Expert) -> Tensor:
        """A change of the rows as expert e reads them."""
        m = self.mutation
        if m == "x_detached":
            return x.detach()
        if m == "dropped_feature":
            return x * (torch.arange(H) != 5)
        return self.at_odd(e, lambda: x * 1.5, lambda: x) if m == "x_scaled_one" else x

    def read(self, x_TH: Tensor) -> Tensor:
        """A change of the token table that the experts read."""
        return x_TH.roll(1, 0) if self.mutation == "x_next_token" else x_TH

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        m = self.mutation
        if (m == "halves_interleaved") != self.interleaved:
            gate, up = h[..., ::2], h[..., 1::2]
        elif m == "slice_off_by_one":
            gate, up = h[..., :I], h[..., I - 1 : 2 * I - 1]
        else:
            gate, up = h.chunk(2, dim=-1)
        if m == "slice_off_by_one" and self.interleaved:
            up = h[..., ::2].roll(1, -1)
        return (up, gate) if m == "halves_swapped" else (gate, up)

    def glu(self, gate: Tensor, up: Tensor, e: Expert) -> Tensor:
        m = self.mutation
        if m == "act_all":
            return F.gelu(gate) * up
        if m == "act_one":
            return self.at_odd(e, lambda: F.relu(gate) * up, lambda: F.silu(gate) * up)
        if m == "ungated_one":
            return self.at_odd(e, lambda: F.silu(gate), lambda: F.silu(gate) * up)
        return F.silu(gate) * up

    def inside(self, h: Tensor, e: Expert) -> Tensor:
        """Activation of the up projection [..., 2I] -> [..., I], with what may be changed about it."""
        m = self.mutation
        gate, up = self.halves(h)
        if m == "clamp_all":
            gate = gate.clamp(max=0.5)
        if m == "clamp_one":
            gate = self.at_odd(e, lambda: gate.clamp(max=0.5), lambda: gate.clamp(max=0.8))
        a = self.glu(gate, up, e)
        changed: dict[str, Callable[[], Tensor]] = {
            "bf16_inside": lambda: a.bfloat16().to(a.dtype),
            "bf16_inside_one": lambda: self.at_odd(e, lambda: a.bfloat16().to(a.dtype), lambda: a),
            "hidden_detached": a.detach,
            "scale_inside": lambda: a * 1.5,
            "scale_inside_one": lambda: self.at_odd(e, lambda: a * 1.5, lambda: a),
        }
        return changed[m]() if m in changed else a

    def leaving(self, y: Tensor, x: Tensor, e: Expert) -> Tensor:
        """A change of what expert e gives for the rows x."""
        m = self.mutation
        number = e if isinstance(e, int) else e.unsqueeze(-1)
        changed: dict[str, Callable[[], Tensor]] = {
            "scale_outside_one": lambda: self.at_odd(e, lambda: y * 2, lambda: y),
            "scale_by_index": lambda: y * number,
            "residual_inside": lambda: y + x,
            "residual_one": lambda: self.at_odd(e, lambda: y + x, lambda: y),
            "relu_out": lambda: F.relu(y),
            "no_grad_one": lambda: self.at_odd(e, y.detach, lambda: y),
            "constant_added": lambda: y + 0.25,
        }
        return changed[m]() if m in changed else y

    def expert(self, x: Tensor, e: int) -> Tensor:
        """Expert e of the rows x, for styles that loop."""
        if self.mutation == "no_grad_one" and e == ODD:
            with torch.no_grad():
                return self.plain(x, e)
        return self.plain(x, e)

    def plain(self, x: Tensor, e: int) -> Tensor:
        x = self.entering(x, e)
        h = self.inside(self.linear(x, 0, e), e)
        y = self.leaving(self.linear(h, 1, e), x, e)
        return y if self.mutation != "no_grad_one" else y * 1

    def linear(self, x: Tensor, j: int, e: int) -> Tensor:
        return F.linear(x, self.weight(j, e), self.bias(j, e))

    def vector(self, x: Tensor, e: Tensor, linear: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The experts e (a tensor of ids that broadcasts against rows) of x, for vectorised styles."""
        x = self.entering(x, e)
        h = self.inside(linear(x, 0), e)
        return self.leaving(linear(h, 1), x, e)
