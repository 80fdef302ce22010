"""Grammar of loops over experts: which are visited, which tokens each takes, what is skipped, how results are added up."""

from __future__ import annotations

from fuzz.experts import ODD, call
from fuzz.spec import Spec, indented

COUNTS = "F.one_hot(ids, E).sum(dim=(0, 1))"

# Lines before the loop, and its first line.
HEADS: dict[str, list[str]] = {
    "range": ["for e in range(E):"],
    "slots": ["for k in range(K):", "    for e in range(E):"],
    "hit_rows": [f"hit = ({COUNTS} > 0).nonzero()", "for e in hit:", "    e = int(e)"],
    "hit_list": [f"hit = torch.greater({COUNTS}, 0).nonzero().flatten().tolist()", "for e in hit:"],
    "hit_squeezed": [
        "mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)",
        "hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()",
        "for e in hit:",
        "    e = e[0]",
    ],
    "unique": ["for e in torch.unique(ids).tolist():"],
    "unique_tensors": ["for e in ids.unique():", "    e = e.item()"],
    "bincount_hit": [
        "hit = torch.bincount(ids.flatten(), minlength=E).nonzero(as_tuple=True)[0]",
        "for e in hit.tolist():",
    ],
    "counts_listed": [
        "counts = torch.bincount(ids.flatten(), minlength=E).tolist()",
        "for e, n in enumerate(counts):",
        "    if n == 0:",
        "        continue",
    ],
    "counts_numpy": [
        f"counts = {COUNTS}.cpu().numpy()",
        "for e in range(E):",
        "    if counts[e] == 0:",
        "        continue",
    ],
    "set": ["for e in sorted(set(ids.flatten().tolist())):"],
    "busiest_first": [f"for e in {COUNTS}.argsort(descending=True).tolist():"],
}
SKIPPING = ("hit_rows", "hit_list", "hit_squeezed", "unique", "unique_tensors", "bincount_hit", "counts_listed", "counts_numpy", "set")

# Lines that make t (rows of x, or a mask of them) and share [n, 1] for expert e.
SELECTS: dict[str, list[str]] = {
    "where": ["t, k = torch.where(ids == e)", "share = w[t, k, None]"],
    "nonzero": ["at = (ids == e).nonzero()", "t, k = at[:, 0], at[:, 1]", "share = w[t, k].unsqueeze(-1)"],
    "nonzero_tuple": ["t, k = (ids == e).nonzero(as_tuple=True)", "share = w[t, k].view(-1, 1)"],
    "one_hot": ["k, t = torch.where(hot[e])", "share = w[t, k, None]"],
    "any_rows": ["here = ids == e", "t = here.any(dim=-1).nonzero().squeeze(-1)", "share = (w * here).sum(-1, keepdim=True)[t]"],
    "mask": ["here = ids == e", "t = here.any(dim=-1)", "share = (w * here).sum(dim=-1)[t].unsqueeze(-1)"],
    "mask_weights": ["here = ids == e", "t = here.any(-1)", "share = w[here].unsqueeze(-1)"],
    "scattered": ["share = combine[:, e, None]", "t = (share > 0).nonzero()[:, 0]", "share = share[t]"],
    "dense": ["share = (w * (ids == e)).sum(-1, keepdim=True)"],
    "dense_scattered": ["share = combine[:, e].unsqueeze(1)"],
}
BEFORE = {
    "one_hot": ["hot = F.one_hot(ids, num_classes=E).permute(2, 1, 0)"],
    "scattered": ["combine = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)"],
    "dense_scattered": ["combine = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w)"],
}
DENSE = ("dense", "dense_scattered")
MASKS = ("mask", "mask_weights")
SLOT = ["t = (ids[:, k] == e).nonzero().flatten()", "share = w[t, k, None]"]  # where the loop goes over slots as well

# Whether there is anything to do, on t or on what it was made of.
SKIPS = {
    "never": None,
    "numel": "t.numel() == 0",
    "shape": "t.shape[0] == 0",
    "len": "len(t) == 0",
    "any": "not (ids == e).any()",
    "sum": "(ids == e).sum() == 0",
    "item": "(ids == e).sum().item() == 0",
    "some": "(ids == e).any()",  # written the other way round: what follows stands under the `if`
}
OF_MASK = ("never", "any", "sum", "item", "some")  # what may be asked where t is a mask

ADDS: dict[str, str] = {
    "index_add_": "out.index_add_(0, t, y.to(out.dtype))",
    "index_add": "out = out.index_add(0, t, y)",
    "set_plus": "out[t] += y",
    "set": "out[t] = out[t] + y",
    "scatter_add_": "out.scatter_add_(0, t[:, None].expand(-1, H), y)",
    "index_put_": "out.index_put_((t,), y, accumulate=True)",
}
ADD_MASKS = ("set_plus", "set")

MISTAKES = (
    "first_missing", "last_missing", "visited_twice", "first_row_skipped", "lands_next_token", "overwritten", "decays",
    "share_of_next_expert", "shares_flipped", "x_changed_between", "half_the_features",
)  # fmt: skip
# What Python makes of the numbers of tokens.
LOOKS = (
    "few_skipped", "limited", "stops_at_gap", "position_for_expert", "gap_adds", "last_hit_left", "hits_of_other_gate",
    "divided_by_visits", "large_limit", "kept_from_before", "count_scales",
)  # fmt: skip


def loop_lines(s: Spec) -> list[str]:
    """From x, w, ids to out."""
    head = _head(s)
    level = 1 + (s.head == "slots")
    inner = [*_selected(s), *_looked(s), *_skipped(s), *_computed(s)]
    before = BEFORE.get(s.select, []) if s.head != "slots" else []
    return [*before, f"out = torch.{'empty_like(x).zero_()' if s.add == 'index_put_' else 'zeros_like(x)'}", *_start(s), *head,
            *indented(inner, level), *_end(s)]  # fmt: skip


def _head(s: Spec) -> list[str]:
    lines, m = HEADS[s.head], s.mistake
    turned = {"last_missing": "range(E - 1)", "first_missing": "range(1, E)", "visited_twice": f"[*range(E), {ODD}]"}
    if m in turned and s.head in ("range", "slots"):
        return [line.replace("in range(E)", f"in {turned[m]}") for line in lines]
    if m == "last_hit_left":
        return [line.replace("in hit:", "in hit[:-1]:") for line in lines]
    if m == "hits_of_other_gate":
        return ["others = self.other_gate(x).topk(K)[1]", *[line.replace("ids", "others") for line in lines]]
    if m == "few_skipped":
        return [line.replace(", 0).nonzero", ", 1).nonzero").replace("> 0", "> 1").replace("== 0", "< 2") for line in lines]
    return lines


def _start(s: Spec) -> list[str]:
    if s.mistake in ("position_for_expert", "divided_by_visits"):
        return ["visits = 0"]
    return ["x = x.clone()"] if s.mistake == "x_changed_between" else []


def _end(s: Spec) -> list[str]:
    return ["out = out / visits"] if s.mistake == "divided_by_visits" else []


def _selected(s: Spec) -> list[str]:
    lines, m = list(SLOT if s.head == "slots" else SELECTS[s.select]), s.mistake
    if m == "share_of_next_expert":
        lines.append("share = share.roll(1, 0)" if s.select in DENSE else "share = share[:1].expand_as(share)")
    if m == "shares_flipped":
        lines.append("share = share.flip(0)")
    if m == "first_row_skipped":
        lines.append("t, share = t[1:], share[1:]")
    if m == "kept_from_before":
        lines.append(f"t, share = (t, share) if e != {ODD} or self.kept is None else (t[:1], share[:1])")
        lines.append("self.kept = True")
    return lines


def _looked(s: Spec) -> list[str]:
    """Questions about the number of tokens whose answers matter."""
    m = s.mistake
    count = "int((ids == e).sum())" if s.select in (*DENSE, *MASKS) else "t.shape[0]"
    lines = {
        "limited": [f"if {count} > 2:", "    t, share = t[:2], share[:2]"],
        "large_limit": [f"if {count} > 500:", "    t, share = t[:500], share[:500]"],
        "stops_at_gap": [f"if {count} == 0:", "    break"],
        "gap_adds": [f"if {count} == 0:", "    out = out + 1"],
        "count_scales": [f"share = share / max({count}, 1)"],
    }.get(m, [])
    return [f"if {count} < 2:", "    continue"] if m == "few_skipped" and s.head not in SKIPPING else lines


def _skipped(s: Spec) -> list[str]:
    test = SKIPS[s.skip]
    return [f"if {test}:", "    continue"] if test and s.skip != "some" else []


def _computed(s: Spec) -> list[str]:
    m, dense = s.mistake, s.select in DENSE and s.head != "slots"
    rows = "x" if dense else "x[t]"
    number = "visits" if m == "position_for_expert" else "e"
    before = s.weighted == "before"
    lines = [f"y = {call(s, number, f'{rows} * share' if before else rows)}" + ("" if before else " * share")]
    if m == "half_the_features":
        lines.append("y = y * (torch.arange(H) < 4)")
    if m == "lands_next_token":
        lines.append("y = y.roll(1, 0)" if dense else "t = (t + 1) % x.shape[0]")
    if m == "overwritten":
        lines.append("out = y" if dense else "out[t] = y")
    else:
        lines.append("out = out + y" if dense else ADDS[s.add])
    lines += ["out = out * 0.9"] if m == "decays" else []
    lines += ["x = x * 1.5"] if m == "x_changed_between" else []
    lines += ["visits += 1"] if m in ("position_for_expert", "divided_by_visits") else []
    return [f"if {SKIPS['some']}:", *indented(lines)] if s.skip == "some" else lines
