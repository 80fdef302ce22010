"""Grammar of routers: lines that make w [T, K] and ids [T, K] of x [T, H]."""

from __future__ import annotations

from dataclasses import dataclass

from fuzz.spec import Spec


@dataclass(frozen=True)
class Router:
    """lines: after `logits = self.gate(x)`.  init: more lines of __init__.  only: the top_k that it can, 0 for any."""

    lines: tuple[str, ...]
    init: tuple[str, ...] = ()
    only: int = 0
    even: bool = False  # asks for an even number of experts


BIAS = ('self.register_buffer("correction", torch.linspace(-0.2, 0.2, E))',)
RENORM = "w = w / w.sum(-1, keepdim=True)"
TWO = ("p = logits.softmax(-1)", "first = p.argmax(-1)", "one = F.one_hot(first, E)")

ROUTERS: dict[str, Router] = {
    "softmax_topk": Router(("w, ids = torch.topk(logits.softmax(-1), K, dim=-1)",)),
    "renormalised": Router(("w, ids = torch.topk(logits.softmax(-1), K, dim=-1)", RENORM)),
    "renormalised_in_place": Router(("w, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(K)", "w /= w.sum(-1, keepdim=True)",
                                     "w = w.to(x.dtype)")),
    "topk_softmax": Router(("top, ids = torch.topk(logits, K)", "w = top.softmax(-1)")),
    "masked_softmax": Router(("top, ids = logits.topk(K)", "kept = torch.full_like(logits, float('-inf')).scatter(-1, ids, top)",
                              "w = kept.softmax(-1).gather(-1, ids)")),
    "sigmoid": Router(("w, ids = torch.topk(logits.sigmoid(), K, dim=-1, sorted=False)",)),
    "sigmoid_renormalised": Router(("w, ids = logits.sigmoid().topk(K)", "w = w / (w.sum(-1, keepdim=True) + 1e-20)")),
    "sigmoid_after": Router(("top, ids = logits.topk(K)", "w = top.sigmoid()")),
    "scaled": Router(("w, ids = logits.softmax(-1).topk(K)", "w = w * self.scale"), ("self.scale = 2.5",)),
    "temperature": Router(("w, ids = (logits / self.scale).softmax(-1).topk(K)",), ("self.scale = 0.7",)),
    "bias_corrected": Router(("p = logits.sigmoid()", "ids = (p + self.correction).topk(K)[1]", "w = p.gather(1, ids)", RENORM), BIAS),
    "grouped": Router(("p = logits.softmax(-1)", "best = p.view(-1, E // 2, 2).amax(-1).argmax(-1, keepdim=True)",
                       "inside = torch.arange(E // 2) == best", "p = p.masked_fill(~inside.repeat_interleave(2, dim=-1), 0.0)",
                       "w, ids = p.topk(K)"), even=True),
    "noisy": Router(("if self.training:", "    logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))",
                     "w, ids = logits.softmax(-1).topk(K)"), ("self.noise = nn.Linear(H, E)",)),
    "argmax": Router(("p = logits.softmax(-1)", "ids = p.argmax(-1, keepdim=True)", "w = p.gather(-1, ids)"), only=1),
    "max": Router(("w, ids = logits.softmax(-1).max(-1, keepdim=True)",), only=1),
    "max_unsqueezed": Router(("w, ids = torch.max(logits.softmax(dim=-1), dim=-1)", "w, ids = w.unsqueeze(-1), ids.unsqueeze(-1)"), only=1),
    "sorted": Router(("p, order = logits.softmax(-1).sort(dim=-1, descending=True)", "w, ids = p[:, :K], order[:, :K]")),
    "argsorted": Router(("p = logits.softmax(-1)", "ids = p.argsort(dim=-1, descending=True)[..., :K]", "w = p.gather(-1, ids)")),
    "argmax_twice": Router((*TWO, "second = p.masked_fill(one.bool(), -1.0).argmax(-1)", "ids = torch.stack([first, second], dim=-1)",
                            "w = p.gather(-1, ids)"), only=2),
    "float32": Router(("w, ids = torch.topk(logits.float().softmax(-1), K)", RENORM, "w = w.type_as(x)")),
}  # fmt: skip


def fits(s: Spec) -> bool:
    r = ROUTERS[s.router]
    return (not r.only or r.only == s.top_k) and (not r.even or s.experts % 2 == 0)


def router_lines(s: Spec) -> list[str]:
    return ["logits = self.gate(x)", *ROUTERS[s.router].lines]


def router_init(s: Spec) -> list[str]:
    return ["self.gate, self.other_gate = nn.Linear(H, E), nn.Linear(H, E)", *ROUTERS[s.router].init]
