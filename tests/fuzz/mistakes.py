"""Grammar of mistakes: small edits that make the block something else.  Some are lines of their own, the others are known to the parts.

The block with the mistake is its own reference: it may be rewritten as what it computes, or left; it must never become another.
"""

from __future__ import annotations

from fuzz import loops, styles
from fuzz.experts import LISTS
from fuzz.spec import PLAIN, Spec

COUNTS = loops.COUNTS

# Lines after the router: the routing is another one.
ROUTING: dict[str, list[str]] = {
    "ids_shifted": ["ids = (ids + 1) % E"],
    "ids_reversed": ["ids = E - 1 - ids"],
    "ids_of_next_token": ["ids = ids.roll(1, 0)"],
    "ids_of_other_gate": ["ids = self.other_gate(x).topk(K)[1]"],
    "slots_alike": ["ids = ids[:, :1].expand(-1, K)"],
    "w_twice": ["w = w * w"],
    "w_renormalised_over_tokens": ["w = w / w.sum(0, keepdim=True)"],
    "w_of_next_token": ["w = w.roll(1, 0)"],
    "w_flipped": ["w = w.flip(-1)"],
    "w_detached": ["w = w.detach()"],
    "w_rounded": ["w = w.bfloat16().to(w.dtype)"],
    "slot_dropped": ["w = w * (torch.arange(K) < K - 1)"],
    "token_dropped": ["w = w.masked_fill((torch.arange(x.shape[0]) == 0).unsqueeze(-1), 0.0)"],
    "w_thresholded": ["w = w * (w > 0.3)"],
    "w_by_load": [f"w = w / {COUNTS}[ids]"],
    "w_of_count": [f"w = w * (1 + {COUNTS}.max())"],
    "w_of_seen": ["self.seen += 1", "w = w * self.seen"],
    "fixed_capacity": ["hot = F.one_hot(ids.flatten(), E)", "w = w * (((hot.cumsum(0) - 1) * hot).sum(-1).view_as(ids) < 2)"],
}

# The same, by a setting outside of the module or in it, which may change later.
SETTINGS: dict[str, list[str]] = {
    "w_of_config": ['w = w * CONFIG["scale"]'],
    "w_of_object": ["w = w * OBJECT.scale"],
    "w_of_class": ["w = w * self.SCALE"],
    "w_of_limits": ["for limit in LIMITS:", "    w = w.clamp(max=limit)"],
    "w_of_closure": ["w = weigh(w)"],
    "w_of_table": ["w = w * TABLE[0]"],
    "w_of_own_list": ["w = w * sum(self.scales)"],
    "w_of_own_dict": ['w = w * self.settings["scale"]'],
    "w_of_class_list": ["w = w * self.SCALES[1]"],
}

# Lines after the router: Python decides, and its decision matters.
DECIDED: dict[str, list[str]] = {
    "if_value": ["if w.max() > 0.6:", "    w = w * 2"],
    "if_value_item": ["if w[0, 0].item() > 0.5:", "    w = w * 2"],
    "if_count": [f"if ({COUNTS} > 2).any():", "    w = w * 2"],
    "if_all_hit": [f"if ({COUNTS} > 0).all():", "    w = w * 2"],
    "if_some_empty": [f"if ({COUNTS} == 0).any():", "    w = w * 2"],
    "if_first_empty": ["if not (ids == 0).any():", "    w = w * 2"],
    "if_few_hit": ["if len(torch.unique(ids)) < E:", "    w = w * 2"],
    "if_few_listed": ["if len(ids.unique().tolist()) < 3:", "    w = w * 2"],
    "if_many_rows": ["if (ids == 1).nonzero().shape[0] > 2:", "    w = w * 2"],
    "if_very_many_rows": ["if (ids == 1).nonzero().shape[0] > 400:", "    w = w * 2"],
    "if_just_some_rows": ["if 1 < torch.where(ids == 0)[0].numel() < 4:", "    w = w * 2"],
    "if_listed_count": [f"if max({COUNTS}.tolist()) > 3:", "    w = w * 2"],
    "if_numpy_count": [f"if {COUNTS}.numpy().max() > 3:", "    w = w * 2"],
    "if_id": ["if ids[0, 0] == 0:", "    w = w * 2"],
    "if_ids_sorted": ["if ids.flatten().tolist() == sorted(ids.flatten().tolist()):", "    w = w * 2"],
    "if_max_id": ["if ids.max() < E - 1:", "    w = w * 2"],
    "if_tokens": ["if x.shape[0] > 5:", "    w = w * 2"],
    "if_tokens_even": ["if x.shape[0] % 2 == 0:", "    w = w * 2"],
    "if_many_tokens": ["if len(x) >= 64:", "    w = w * 2"],
    "if_training": ["if self.training:", "    w = w * 2"],
    "if_gradients": ["if torch.is_grad_enabled() and x.requires_grad:", "    w = w * 2"],
    "if_weight": ["if self.gate.bias[0] > 1:", "    w = w * 2"],
    "if_called_before": ["self.calls += 1", "if self.calls > 2:", "    w = w * 2"],
    "if_seen_before": ["self.seen += 1", "if self.seen > 2:", "    w = w * 2"],
    "if_called_globally": ["global CALLS", "CALLS += 1", "if CALLS > 2:", "    w = w * 2"],
    "if_listed_globally": ["CALLED.append(1)", "if len(CALLED) > 2:", "    w = w * 2"],
    "ids_of_first_call": ["self.kept = ids[:1] if self.kept is None else self.kept", "ids = torch.cat([self.kept, ids[1:]])"],
    "busiest_dropped": [f"busy = {COUNTS}.argmax().item()", "w = w * (ids != busy)"],
    "mean_id_scales": ["w = w * ids.float().mean().item()"],
    "number_of_value": ["w = w * float(w.sum())"],
    "busiest_scales": [f"w = w / max({COUNTS}.tolist())"],
    "third_row_or_not": ["try:", "    (ids == 0).nonzero()[2]", "except IndexError:", "    w = w * 2"],
    "fallback": ["w = w if w.isfinite().all() else torch.ones_like(w)"],
    "asserted": ["assert (ids >= 0).all()"],
}

# Lines after the sum: another result.
RESULT: dict[str, list[str]] = {
    "out_rolled": ["out = out.roll(1, 0)"],
    "out_clamped": ["out = out.clamp(-0.5, 0.5)"],
    "out_by_hits": ["out = out / (F.one_hot(ids, E).sum((0, 1)) > 0).sum()"],
    "out_by_hits_listed": ["out = out / len(torch.unique(ids).tolist())"],
    "if_large": ["if out.abs().max() > 1:", "    out = out / 2"],
    "first_row_zeroed": ["out[0] = 0"],
    "flushed": ["out = torch.where(out.abs() > 0.05, out, 0.0)"],
}
INIT = {
    "if_called_before": ["self.calls = 0"],
    "if_seen_before": ['self.register_buffer("seen", torch.zeros(()))'],
    "w_of_seen": ['self.register_buffer("seen", torch.zeros(()))'],
    "ids_of_first_call": ["self.kept = None"],
    "kept_from_before": ["self.kept = None"],
    "counts_from_before": ["self.kept = None"],
    "w_of_own_list": ["self.scales = [0.5, 0.75]"],
    "w_of_own_dict": ['self.settings = {"scale": 1.5}'],
}
GLOBALS = {
    "if_called_globally": ["CALLS = 0"],
    "if_listed_globally": ["CALLED = []"],
    "w_of_config": ['CONFIG = {"scale": 1.5}'],
    "w_of_object": ["OBJECT = SimpleNamespace(scale=1.5)"],
    "w_of_limits": ["LIMITS = [0.9, 0.6]"],
    "w_of_closure": ["BOX = [1.5]", "", "", "def scaling(box):", "    return lambda w: w * box[0]", "", "", "weigh = scaling(BOX)"],
    "w_of_table": ["TABLE = torch.tensor([1.5, 0.5])"],
}
CLASS = {"w_of_class": ["SCALE = 1.5", ""], "w_of_class_list": ["SCALES = [1.0, 1.5]", ""]}

EXPERTS = ("hidden_detached", "constant_added", "rounded_inside")
LOOPED_EXPERTS = ("act_one", "scaled_one", "residual_one", "detached_one", "scaled_by_number", "expert_rotated")
ROUNDING = frozenset({"rounded_inside", "w_rounded"})


def mistakes(s: Spec) -> list[str]:
    """All that this block, without one as yet, may have; none first."""
    found = [PLAIN, *ROUTING, *SETTINGS, *DECIDED, *RESULT, *_experts(s), *_dispatch(s)]
    return [m for m in dict.fromkeys(found) if m not in _without(s)]


def _experts(s: Spec) -> list[str]:
    found = [*EXPERTS]
    looped = s.spelling not in (*styles.GATHERED, *styles.DENSE)
    found += LOOPED_EXPERTS if looped else ["expert_rotated"]
    if s.storage not in LISTS:
        found += ["weight_detached", "down_rotated"]
    if looped and s.spelling in ("loop", "sort_split", "sort_slices") and s.head not in ("hit_squeezed",):
        found += ["experts_share"]
    return found


def _dispatch(s: Spec) -> list[str]:
    if s.spelling != "loop":
        kind = "sorted" if s.spelling in styles.SORTED else "gathered" if s.spelling in styles.GATHERED else "dense"
        return list(styles.MISTAKES.get(kind if kind != "dense" or s.spelling in styles.DENSE else s.spelling, ()))
    return [*loops.MISTAKES, *loops.LOOKS]


def _without(s: Spec) -> set[str]:
    """What cannot be said in this spelling, or has no defined meaning there."""
    none: set[str] = set()
    if s.spelling == "loop":
        none |= _without_loop(s)
    if s.spelling == "sort_split":
        none |= {"bounds_shifted", "few_skipped", "position_for_expert", "counts_from_before", "shares_unsorted"}
    if s.spelling in styles.SORTED and s.spelling != "sort_split":
        none |= {"unsorted_back"}
    if s.top_k == 1:
        none |= {"slots_alike", "w_flipped"}
    if s.spelling in ("dense_combine", "dense_one_hot", "dense_gathered") or s.select in ("scattered", "dense_scattered", "mask_weights"):
        none |= {"slots_alike"}  # two values scattered to one place
    if s.spelling == "dense_gathered":
        none |= {*styles.MISTAKES["dense"]}
    if s.extra in ("beyond", "below"):
        none |= {"out_by_hits", "kept_from_before"}
    return none


def _without_loop(s: Spec) -> set[str]:
    none: set[str] = set()
    dense = s.select in loops.DENSE and s.head != "slots"
    masks = s.select in loops.MASKS and s.head != "slots"
    if s.head not in ("range", "slots"):
        none |= {"last_missing", "first_missing", "visited_twice"}
    if s.head not in ("hit_rows", "hit_list", "hit_squeezed"):
        none |= {"last_hit_left"}
    if s.head not in loops.SKIPPING:
        none |= {"hits_of_other_gate"}
    if dense or masks:
        none |= {"first_row_skipped", "limited", "large_limit", "kept_from_before"}
    if masks:
        none |= {"lands_next_token"}
    if dense:
        none |= {"overwritten"} if s.skip == "some" else set()
    if s.head == "hit_squeezed":
        none |= {"kept_from_before"}
    if s.head in ("slots", "set", "busiest_first") or (s.head == "counts_listed" and s.select in loops.DENSE):
        none |= {"position_for_expert"}
    if s.skip == "some":
        none |= {"stops_at_gap"}
    if s.add in ("set", "set_plus"):
        none |= {"slots_alike"}  # two values put in one place
    if s.head in ("unique", "unique_tensors", "set", "busiest_first", "bincount_hit"):
        none |= {"stops_at_gap", "gap_adds"}
    return none
