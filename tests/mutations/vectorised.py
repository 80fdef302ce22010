"""Styles without a loop: weights gathered per token, or every expert on every token."""

from __future__ import annotations

import torch
from torch import Tensor

from mutations.base import E, Family, H, K

SLOTS = ("mean_over_slots", "max_over_slots", "weights_over_features")


class GatherBmm(Family):
    """w[ids] per (token, slot), bmm, view(T, K, H), weighted sum."""

    own = (*SLOTS, "repeat_not_interleave", "summed_as_k_major", "neighbour_gather")

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        m, e = self.mutation, ids.reshape(-1)
        x = self.read(x)
        rows = x.repeat(K, 1) if m == "repeat_not_interleave" else x.repeat_interleave(K, 0)

        def linear(a: Tensor, j: int) -> Tensor:
            pick = e.roll(1, 0) if m == "neighbour_gather" and j == 1 else e
            y, table = torch.bmm(self.weights(j)[pick], a.unsqueeze(-1)).squeeze(-1), self.bias_table(j)
            return y if table is None else y + table[e]

        return self.combine(self.vector(rows, e, linear), w).view_as(hidden)

    def combine(self, y: Tensor, w: Tensor) -> Tensor:
        m, n = self.mutation, w.shape[0]
        if m == "summed_as_k_major":
            return (y.view(K, n, H) * w.t().unsqueeze(-1)).sum(0)
        y = y.view(n, K, H)
        y = y * (w.softmax(0) if m == "weights_over_features" else w).unsqueeze(-1)
        if m == "max_over_slots":
            return y.amax(1)
        return y.mean(1) if m == "mean_over_slots" else y.sum(1)


class GatherEinsum(Family):
    """gpt-oss: einsum with gathered weights and biases, interleaved gate and up."""

    own = ("slots_crossed", "weights_of_slot_0", "up_plus_one")
    interleaved = True

    def glu(self, gate: Tensor, up: Tensor, e: int | Tensor) -> Tensor:
        return super().glu(gate, up + 1 if self.mutation == "up_plus_one" else up, e)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        m = self.mutation

        def linear(a: Tensor, j: int) -> Tensor:
            spelling = "th,tkoh->tko" if a.dim() == 2 else "tkh,tkoh->tko"
            y, table = torch.einsum(spelling, a, self.weights(j)[ids]), self.bias_table(j)
            return y if table is None else y + table[ids]

        rows = self.read(x)
        needs_rows = m in ("x_scaled_one", "residual_inside", "residual_one")
        y = self.vector(rows.unsqueeze(1).expand(-1, K, -1) if needs_rows else rows, ids, linear)
        if m == "slots_crossed":
            return torch.einsum("tkh,tk->th", y.flip(1), w).view_as(hidden)
        share = w[:, :1].expand(-1, K) if m == "weights_of_slot_0" else w
        return torch.einsum("tkh,tk->th", y, share).view_as(hidden)


class DenseEinsum(Family):
    """einsum over all experts, the selected ones gathered, weighted sum."""

    own = (*SLOTS, "gather_of_neighbour", "all_experts_summed")

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        m, e = self.mutation, torch.arange(E)

        def linear(a: Tensor, j: int) -> Tensor:
            y, table = torch.einsum("teh,eoh->teo", a, self.weights(j)), self.bias_table(j)
            return y if table is None else y + table

        y = self.vector(self.read(x).unsqueeze(1).expand(-1, E, -1), e, linear)
        if m == "all_experts_summed":
            return (y.mean(1) * w.sum(-1, keepdim=True)).view_as(hidden)
        pick = ids.roll(1, 0) if m == "gather_of_neighbour" else ids
        y = torch.gather(y, 1, pick.unsqueeze(-1).expand(-1, -1, H))
        y = y * (w.softmax(0) if m == "weights_over_features" else w).unsqueeze(-1)
        if m == "max_over_slots":
            return y.amax(1).view_as(hidden)
        return (y.mean(1) if m == "mean_over_slots" else y.sum(1)).view_as(hidden)


class DenseBmm(Family):
    """x.repeat(E, 1), bmm over all experts, scores[T, E] by scatter, weighted sum over experts."""

    own = (
        "dense_scores",
        "scores_of_neighbour",
        "scores_untransposed",
        "scatter_on_ones",
        "mean_over_experts",
    )
    without = frozenset({"duplicate_slots"})  # scatter of two values to one place has no defined result

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        e = torch.arange(E).unsqueeze(-1)

        def linear(a: Tensor, j: int) -> Tensor:
            y, table = torch.bmm(a, self.weights(j).transpose(1, 2)), self.bias_table(j)
            return y if table is None else y + table.unsqueeze(1)

        y = self.vector(self.read(x).repeat(E, 1).view(E, -1, H), e, linear)
        y = y * self.share(x, w, ids).unsqueeze(-1)
        return (y.mean(0) if self.mutation == "mean_over_experts" else y.sum(0)).view_as(hidden)

    def share(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        """Scores [E, T]."""
        m = self.mutation
        if m == "dense_scores":
            return self.scores(x).t()
        empty = torch.full((x.shape[0], E), float(m == "scatter_on_ones"), dtype=w.dtype)
        scores = empty.scatter(1, ids, w)
        if m == "scores_untransposed":
            return scores.reshape(E, -1)
        return scores.roll(1, 1).t() if m == "scores_of_neighbour" else scores.t()


class InputWeighted(Family):
    """Llama4: the score multiplies the input, unselected experts see zero rows, plain sum over experts."""

    own = ("dense_scores", "scores_of_neighbour", "scatter_on_ones", "mean_over_experts", "biases_leak",
           "activation_leaks", "weighted_twice")  # fmt: skip
    without = frozenset({"duplicate_slots", "constant_added"})
    biases = False  # a bias would reach every token: that is the mutation biases_leak

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.view(-1, H)
        w, ids = self.route(x)
        scores = self.scores(x) if m == "dense_scores" else self.scattered(x, w, ids)
        share = scores.t().reshape(-1, 1)

        def linear(a: Tensor, j: int) -> Tensor:
            y = torch.bmm(a.view(E, -1, a.shape[-1]), self.weights(j).transpose(1, 2))
            y = y + self.b1.unsqueeze(1) if m == "biases_leak" and j == 0 else y
            return (torch.cos(y) if m == "activation_leaks" and j == 0 else y).view(-1, y.shape[-1])

        e = torch.arange(E).repeat_interleave(x.shape[0])
        y = self.vector(self.read(x).repeat(E, 1) * share, e, linear)
        y = (y * share if m == "weighted_twice" else y).view(E, -1, H)
        return (y.mean(0) if m == "mean_over_experts" else y.sum(0)).view_as(hidden)

    def scattered(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        empty = (
            torch.ones(x.shape[0], E, dtype=w.dtype) if self.mutation == "scatter_on_ones" else torch.zeros(x.shape[0], E, dtype=w.dtype)
        )
        scores = empty.scatter(1, ids, w)
        return scores.roll(1, 1) if self.mutation == "scores_of_neighbour" else scores
