"""Tables of rows brought into the order of their experts, and back, as libraries and much-copied files have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import MLP, Block, E, H, K, ListBlock, SwiGLU, per_token, variant, x2d, x3d


class ByExpert:
    """Rows of a table of gates, zero where an expert is not chosen: sorted by expert, and added to their tokens in the end."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates
        rows, order = torch.nonzero(gates).sort(0)
        _, self.experts = rows.split(1, dim=1)
        self.tokens = torch.nonzero(gates)[order[:, 1], 0]
        self.sizes = (gates > 0).sum(0).tolist()
        self.shares = torch.gather(gates[self.tokens.flatten()], 1, self.experts)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x[self.tokens].squeeze(1), self.sizes, dim=0)

    def together(self, parts: list[Tensor]) -> Tensor:
        rows = torch.cat(parts, 0).mul(self.shares)
        out = torch.zeros(self.gates.size(0), parts[-1].size(1), requires_grad=True, device=rows.device)
        return out.index_add(0, self.tokens, rows.float())


@variant("sparse_dispatcher", "tensor2tensor's dispatcher: nonzero(gates).sort(0), noisy top-k, a loss beside the output", inputs=x2d)
class SparseDispatcher(ListBlock):
    dispatcher = ByExpert

    def __init__(self) -> None:
        super().__init__(MLP)
        self.noise = nn.Linear(H, E, bias=False)

    def probabilities(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(self.noise(x)) + 1e-2)
        return logits.softmax(1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = self.probabilities(x).topk(K + 1, dim=1)
        w = top[:, :K]
        return w / (w.sum(1, keepdim=True) + 1e-6), ids[:, :K]

    def gates(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return torch.zeros(x.shape[0], E, requires_grad=True).scatter(1, ids, w)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.gates(x)
        sums = [gates.sum(0), (gates > 0).sum(0).float()]
        loss = sum(s.var() / (s.mean() ** 2 + 1e-10) for s in sums) * 1e-2
        dispatcher = self.dispatcher(gates)
        out = dispatcher.together([expert(part) for expert, part in zip(self.experts, dispatcher.parts(x))])
        return out, loss


class InLogSpace(ByExpert):
    """The same of exponentials, from the sorted table itself."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__(gates)
        rows, order = torch.nonzero(gates).sort(0)
        self.tokens = rows[order[:, 1], 0]
        self.sizes = list((gates > 0).sum(0).cpu().numpy())

    def together(self, parts: list[Tensor]) -> Tensor:
        out = super().together([part.exp() for part in parts])
        out[out == 0] = torch.finfo(torch.float64).eps
        return out.log()


@variant("sparse_dispatcher_log", "the same, the sum over experts of exponentials and its log", inputs=x2d)
class SparseDispatcherLog(SparseDispatcher):
    dispatcher = InLogSpace

    def reference(self, x: Tensor) -> Tensor:
        return per_token(x, *self.route(x), lambda e, row: self.experts[e](row).exp()).log()


@variant("routing_map", "Megatron-core: a map of experts and tokens, masked_select of tokens and of probabilities, split, scatter_add_")
class RoutingMap(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        shares = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        chosen = torch.zeros(x.shape[0], E, dtype=torch.int).scatter(1, ids, 1).bool()
        by_expert = chosen.T.contiguous()
        tokens = torch.arange(x.shape[0]).unsqueeze(0).expand(E, -1).masked_select(by_expert)
        parts = torch.split(x.index_select(0, tokens), chosen.sum(0).tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        rows = rows * shares.T.contiguous().masked_select(by_expert).unsqueeze(-1)
        out = torch.zeros_like(x).scatter_add_(0, tokens.unsqueeze(1).expand(-1, H), rows)
        return out.view_as(hidden)


@variant("unique_with_counts", "unique_consecutive of sorted ids with counts, rows from a running start on", inputs=x2d)
class UniqueWithCounts(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        flat, order = ids.flatten().sort(stable=True)
        hit, counts = torch.unique_consecutive(flat, return_counts=True)
        out, start = torch.zeros_like(x), 0
        for e, n in zip(hit.tolist(), counts.tolist()):
            rows = order[start : start + n]
            out.index_add_(0, rows // K, self.experts[e](x[rows // K]) * w.flatten()[rows, None])
            start += n
        return out


@variant("parameters_without_tokens", "minimind: `if y.shape[0] > 0`, else parameters are touched for their gradients", inputs=x2d)
class ParametersWithoutTokens(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        rows, flat = x.repeat_interleave(K, dim=0), ids.view(-1)
        every = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y = expert(rows[flat == e])
            if y.shape[0] > 0:
                every[flat == e] = y
            else:
                every[flat == e] = y + 0 * sum(p.sum() for p in expert.parameters())
        return (every.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


@variant("rows_as_a_column", "Megatron's SwitchMLP: nonzero() as it comes, a column, reads and writes rows [n, 1, H]", inputs=x3d)
class RowsAsAColumn(ListBlock):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).max(-1, keepdim=True)

    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = torch.max(self.gate(hidden).softmax(-1), dim=2)
        x, out = hidden.view(-1, H), torch.empty_like(hidden.view(-1, H))
        for e, expert in enumerate(self.experts):
            rows = (ids.view(-1) == e).nonzero()
            out[rows, :] = expert(x[rows, :])
        return (out * w.view(-1, 1)).view_as(hidden)


@variant("sequences_of_an_expert", "routed by the mean of a sequence: the mask picks whole sequences, expert(x[mask])", inputs=x3d)
class SequencesOfAnExpert(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))

    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden.mean(dim=1))
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            for k in range(K):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask] += w[mask, k].view(-1, 1, 1) * expert(hidden[mask])
        return out

    def reference(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden.mean(dim=1))
        length = hidden.shape[1]
        out = per_token(hidden.reshape(-1, H), w.repeat_interleave(length, 0), ids.repeat_interleave(length, 0), self.expert)
        return out.view_as(hidden)


@variant("each_experts_output_kept", "a list that starts with zeros, one index_add of each expert, stacked and summed", inputs=x2d)
class EachExpertsOutputKept(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        results = [torch.zeros_like(x)]
        for e, expert in enumerate(self.experts):
            t, k = (ids == e).nonzero(as_tuple=True)
            y = torch.einsum("nd,n->nd", expert(torch.index_select(x, 0, t)), w[t, k])
            results.append(torch.index_add(torch.zeros_like(x), 0, t, y))
        return torch.stack(results).sum(0)


@variant("sequences_one_by_one", "for b, for e: mask = ids[b] == e; out[b][mask] += expert(x[b][mask])", inputs=x3d)
class SequencesOneByOne(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden)
        out = torch.zeros_like(hidden)
        for b in range(hidden.shape[0]):
            for e, expert in enumerate(self.experts):
                for k in range(K):
                    mask = ids[b, :, k] == e
                    if mask.any():
                        out[b][mask] += w[b, :, k][mask].unsqueeze(-1) * expert(hidden[b][mask])
        return out
