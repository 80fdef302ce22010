"""Grammar of spellings without a loop of masks: buffers of slots, sorted rows, gathered weights, dense sums, capacity, Python by token."""

from __future__ import annotations

from fuzz.experts import call
from fuzz.spec import Spec, indented

SORTED = ("sort_split", "sort_slices", "sort_numpy", "sort_ends", "sort_tensors")
GATHERED = ("gather_einsum", "gather_bmm")
DENSE = ("dense_combine", "dense_one_hot", "dense_gathered")
MISTAKES = {
    "slot_buffer": ("repeat_not_interleave", "buffer_of_ones", "mean_of_slots", "slots_major", "last_missing"),
    "sorted": ("wrong_tokens", "shares_unsorted", "descending", "unsorted_back", "counts_of_other_gate", "bounds_shifted", "few_skipped",
               "position_for_expert", "last_missing", "counts_from_before"),
    "gathered": ("repeat_not_interleave", "mean_of_slots", "slots_major"),
    "dense": ("column_rolled", "all_scores", "max_of_experts"),
    "capacity": ("counted_from_one", "counted_over_experts", "capacity_one", "shares_not_dropped", "combine_next_row"),
    "tokens": ("first_slot_only", "next_token_read"),
    "groups": ("lists_cut", "lists_turned", "lists_limited", "list_of_next", "first_slots_expert"),
}  # fmt: skip


def style_lines(s: Spec) -> list[str]:
    """From x, w, ids to out."""
    if s.spelling in SORTED:
        return _sorted(s)
    if s.spelling in GATHERED:
        return [*_slots(s), "y = self.some(flat, rows)", *_summed(s)]
    if s.spelling in DENSE:
        return _dense(s)
    return {"slot_buffer": _slot_buffer, "capacity": _capacity, "tokens": _tokens, "groups": _groups}[s.spelling](s)


def _slots(s: Spec) -> list[str]:
    rows = "x.repeat(K, 1)" if s.mistake == "repeat_not_interleave" else "x.repeat_interleave(K, dim=0)"
    return ["flat = ids.reshape(-1)", f"rows = {rows}"]


def _summed(s: Spec) -> list[str]:
    if s.mistake == "slots_major":
        return ["out = (y.view(K, -1, H) * w.t().unsqueeze(-1)).sum(0)"]
    return [f"out = (y.view(-1, K, H) * w.unsqueeze(-1)).{'mean' if s.mistake == 'mean_of_slots' else 'sum'}(dim=1)"]


def _slot_buffer(s: Spec) -> list[str]:
    whole = s.skip == "never" and s.mistake != "last_missing"
    start = "ones_like" if s.mistake == "buffer_of_ones" else "empty_like" if whole else "zeros_like"
    skip = {"never": [], "any": ["if not here.any():", "    continue"], "sum": ["if here.sum() == 0:", "    continue"]}[s.skip]
    body = ["here = flat == e", *skip, f"y[here] = {call(s, 'e', 'rows[here]')}"]
    stop = "E - 1" if s.mistake == "last_missing" else "E"
    return [*_slots(s), f"y = torch.{start}(rows)", f"for e in range({stop}):", *indented(body), *_summed(s)]


def _sorted(s: Spec) -> list[str]:
    m = s.mistake
    counted = "self.other_gate(x).topk(K)[1].flatten()" if m == "counts_of_other_gate" else "flat"
    lines = [
        "flat = ids.flatten()",
        f"order = flat.argsort({'descending=True' if m == 'descending' else 'stable=True' if s.skip == 'never' else ''})",
        f"tok = order {'% x.shape[0]' if m == 'wrong_tokens' else '// K'}",
        f"share = w.flatten(){'' if m == 'shares_unsorted' else '[order]'}.unsqueeze(-1)",
        f"counts = torch.bincount({counted}, minlength=E)",
        *_before(s),
    ]
    return [*lines, *(_pieces(s) if s.spelling == "sort_split" else _slices(s))]


def _before(s: Spec) -> list[str]:
    return ["self.kept, counts = counts, counts if self.kept is None else self.kept"] if s.mistake == "counts_from_before" else []


def _pieces(s: Spec) -> list[str]:
    """Rows split by counts, experts in a list, put together and back."""
    back = ["back = torch.zeros_like(y)", "back[order] = y", *_summed(s)]
    back = ["y = back" if line.startswith("back[") and s.mistake == "unsorted_back" else line for line in back]
    last = "[:-1]" if s.mistake == "last_missing" else ""
    made = f"[{call(s, 'e', 'piece')} for e, piece in enumerate(pieces{last})]"
    pad = ["y = torch.cat([y, y.new_zeros(order.shape[0] - y.shape[0], H)])"] if last else []
    back = [line.replace("y.view", "back.view") for line in back]
    return ["pieces = x[tok].split(counts.tolist())", f"y = torch.cat({made})", *pad, *back]


def _slices(s: Spec) -> list[str]:
    """Rows between running counts, added up."""
    m = s.mistake
    ends = {
        "sort_slices": ["ends = counts.cumsum(0).tolist()", "start = 0"],
        "sort_numpy": ["ends = counts.cpu().numpy().cumsum(0)"],
        "sort_ends": ["start = 0"],
        "sort_tensors": ["ends = torch.cumsum(counts, dim=0)", "start = 0"],
    }[s.spelling]
    begin = {
        "sort_slices": ["end = ends[e]"],
        "sort_numpy": ["start, end = 0 if e == 0 else ends[e - 1], ends[e]"],
        "sort_ends": ["end = start + int(counts[e])"],
        "sort_tensors": ["end = ends[e]"],
    }[s.spelling]
    carries = s.spelling != "sort_numpy"
    few = "end - start < 2" if m == "few_skipped" else "start == end" if s.skip != "never" else None
    skip = [f"if {few}:", *(["    start = end"] if carries else []), "    continue"] if few else []
    shift = " + 1" if m == "bounds_shifted" else ""
    number = "visits" if m == "position_for_expert" else "e"
    row = f"y = {call(s, number, 'x[at]')} * share[start{shift}:end{shift}]"
    body = [*begin, *skip, f"at = tok[start{shift}:end{shift}]", row, "out.index_add_(0, at, y)", *(["start = end"] if carries else [])]
    body += ["visits += 1"] if number == "visits" else []
    count = ["visits = 0"] if number == "visits" else []
    stop = "E - 1" if m == "last_missing" else "E"
    return [*ends, "out = torch.zeros_like(x)", *count, f"for e in range({stop}):", *indented(body)]


def _dense(s: Spec) -> list[str]:
    m = s.mistake
    combine = {
        "dense_combine": "torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)",
        "dense_one_hot": "(F.one_hot(ids, E).to(w.dtype) * w.unsqueeze(-1)).sum(1)",
    }.get(s.spelling, "w")
    if s.spelling == "dense_gathered":
        return ["y = self.every(x)", "y = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))", "out = (y * w.unsqueeze(-1)).sum(1)"]
    lines = [f"combine = {combine}"]
    lines += ["combine = combine.roll(1, -1)"] if m == "column_rolled" else ["combine = logits.softmax(-1)"] if m == "all_scores" else []
    if m == "max_of_experts":
        return [*lines, "out = (self.every(x) * combine.unsqueeze(-1)).amax(1)"]
    return [*lines, 'out = torch.einsum("te,teh->th", combine, self.every(x))']


def _capacity(s: Spec) -> list[str]:
    """Position among the tokens of an expert; what is beyond the capacity is dropped."""
    m = s.mistake
    limit = {"capacity_one": "1"}.get(m, "3")
    axis = "1" if m == "counted_over_experts" else "0"
    keep = "" if m == "shares_not_dropped" else " * kept"
    out = "y.roll(1, 0)" if m == "combine_next_row" else "y"
    body = ["t, k = torch.where((ids == e) & kept)", f"y = {call(s, 'e', 'x[t]')} * share[t, k, None]", f"out.index_add_(0, t, {out})"]
    return [
        "hot = F.one_hot(ids.flatten(), E)",
        f"place = ((hot.cumsum({axis}){'' if m == 'counted_from_one' else ' - 1'}) * hot).sum(-1).view_as(ids)",
        f"kept = place < {limit}",
        f"share = w{keep}",
        "out = torch.zeros_like(x)",
        "for e in range(E):",
        *indented(body),
    ]


def _tokens(s: Spec) -> list[str]:
    read = "(t + 1) % x.shape[0]" if s.mistake == "next_token_read" else "t"
    slots = "1" if s.mistake == "first_slot_only" else "K"
    body = [f"for k in range({slots}):", f"    row = row + {call(s, 'int(ids[t, k])', f'x[{read}]')} * w[t, k]", "rows.append(row)"]
    return ["rows = []", "for t in range(x.shape[0]):", *indented(["row = torch.zeros_like(x[0])", *body]), "out = torch.stack(rows)"]


def _groups(s: Spec) -> list[str]:
    """Tokens in Python lists, one an expert: pairs with the slot, two lists side by side, or a search for each expert."""
    lists = {"never": _lists_of_pairs, "any": _lists_side_by_side, "sum": _searched}[s.skip](s)
    cut = {"lists_cut": "[:2]", "lists_turned": "[::-1]"}.get(s.mistake, "")
    other = "(e + 1) % E" if s.mistake == "list_of_next" else "e"
    body = [
        f"t, k = rows[{other}], slots[{other}]{cut}",
        *(["t = t[:2]"] if s.mistake == "lists_cut" else []),
        "if t:",
        "    t, k = torch.tensor(t), torch.tensor(k)",
        f"    out.index_add_(0, t, {call(s, 'e', 'x[t]')} * w[t, k, None])",
    ]
    return [*lists, "out = torch.zeros_like(x)", "for e in range(E):", *indented(body)]


def _lists_of_pairs(s: Spec) -> list[str]:
    body = [f"lists[{'chosen[0]' if s.mistake == 'first_slots_expert' else 'e'}].append((t, k))"]
    if s.mistake == "lists_limited":
        body = ["if len(lists[e]) < 2:", *indented(body)]
    return [
        "lists = [[] for _ in range(E)]",
        "for t, chosen in enumerate(ids.tolist()):",
        "    for k, e in enumerate(chosen):",
        *indented(body, 2),
        "rows, slots = [[t for t, _ in pairs] for pairs in lists], [[k for _, k in pairs] for pairs in lists]",
    ]


def _lists_side_by_side(s: Spec) -> list[str]:
    chosen = "ids[t, 0]" if s.mistake == "first_slots_expert" else "ids[t, k]"
    body = [f"e = {chosen}.item()", "rows.setdefault(e, []).append(t)", "slots[e].append(k)"]
    if s.mistake == "lists_limited":
        body = [body[0], "used[e] += 1", "if used[e] > 2:", "    continue", *body[1:]]
    lines = ["for t in range(x.shape[0]):", "    for k in range(K):", *indented(body, 2)]
    return ["used = [0] * E", "rows, slots = {e: [] for e in range(E)}, {e: [] for e in range(E)}", *lines]


def _searched(s: Spec) -> list[str]:
    chosen = "chosen[t][0]" if s.mistake == "first_slots_expert" else "chosen[t][k]"
    more = " and t < 3" if s.mistake == "lists_limited" else ""
    found = f"[(t, k) for t in range(x.shape[0]) for k in range(K) if {chosen} == e{more}]"
    pairs = f"pairs = [{found} for e in range(E)]"
    return [
        "chosen = ids.tolist()",
        pairs,
        *(f"{n} = [[pair[{i}] for pair in each] for each in pairs]" for i, n in enumerate(("rows", "slots"))),
    ]
