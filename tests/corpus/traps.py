# ruff: noqa
# fmt: off
"""Blocks that look like MoE code but mean something else (sort, split, scatter and dense styles): none may be lifted wrongly.

CASES: name -> Case(factory, inputs, source, notes).  The prefixes: g grouped_mm, s sort + split + cat, d dense or masked loops,
p Python decides on sizes (these do not come as one graph).
"""
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F

H, I, E, K, T = 64, 48, 6, 2, 16
Case = namedtuple("Case", "factory inputs source notes")
CASES = {}


class Base(nn.Module):
    def __init__(s):
        super().__init__()
        s.gate, s.gate2 = nn.Linear(H, E, bias=False), nn.Linear(H, E, bias=False)
        s.gu, s.dn = nn.Parameter(torch.empty(E, 2 * I, H)), nn.Parameter(torch.empty(E, H, I))

    def route(s, x):
        w, i = torch.topk(F.softmax(s.gate(x), -1), K, -1)
        return w, i

    def f(s, x, e, act=F.silu):
        g, u = F.linear(x, s.gu[e]).chunk(2, -1)
        return F.linear(act(g) * u, s.dn[e])


def trap(fn):
    def factory():
        torch.manual_seed(0)
        m = type(fn.__name__, (Base,), {"forward": fn})()
        for p in m.parameters():
            nn.init.normal_(p, std=0.2)
        return m.eval()
    CASES[fn.__name__] = Case(factory, lambda: (torch.randn(T, H, generator=torch.Generator().manual_seed(1)),), "trap", fn.__doc__)
    return fn


def grouped(s, x, i, w, tok=None, counts_of=None, unsort=True, sort_w=True, off_fix=lambda o, c: o, descending=False, key=None):
    key = i.reshape(-1) if key is None else key
    ids, perm = torch.sort(key, descending=descending)
    xs = x[perm // K] if tok is None else x[tok(perm)]
    ws = w.reshape(-1)[perm] if sort_w else w.reshape(-1)
    c = torch.histc((ids if counts_of is None else counts_of).float(), bins=E, min=0, max=E - 1)
    off = off_fix(torch.cumsum(c, 0, dtype=torch.int32), c.int())
    mm = lambda a, W: torch._grouped_mm(a.bfloat16(), W.bfloat16().transpose(-2, -1), offs=off).float()
    g, u = mm(xs, s.gu).chunk(2, -1)
    y = mm(F.silu(g) * u, s.dn) * ws.unsqueeze(-1)
    if unsort:
        inv = torch.empty_like(perm)
        inv[perm] = torch.arange(perm.size(0))
        y = y[inv]
    return y.view(T, K, H).sum(1)


@trap
def g_control(s, x):
    w, i = s.route(x); return grouped(s, x, i, w)
@trap
def g_wrong_token(s, x):
    w, i = s.route(x); return grouped(s, x, i, w, tok=lambda p: p % T)
@trap
def g_unsorted_weights(s, x):
    w, i = s.route(x); return grouped(s, x, i, w, sort_w=False)
@trap
def g_not_unsorted(s, x):
    w, i = s.route(x); return grouped(s, x, i, w, unsort=False)
@trap
def g_descending(s, x):
    w, i = s.route(x); return grouped(s, x, i, w, descending=True)
@trap
def g_other_counts(s, x):
    w, i = s.route(x); return grouped(s, x, i, w, counts_of=torch.topk(s.gate2(x), K, -1)[1].reshape(-1))
@trap
def g_other_sort_key(s, x):
    w, i = s.route(x); return grouped(s, x, i, w, key=torch.topk(s.gate2(x), K, -1)[1].reshape(-1), counts_of=i.reshape(-1))
@trap
def g_reversed_ids(s, x):
    w, i = s.route(x); return grouped(s, x, E - 1 - i, w)
@trap
def g_slot_major(s, x):
    """ids transposed before the flatten, tokens by perm % T: right, another layout."""
    w, i = s.route(x); ids, perm = torch.sort(i.t().reshape(-1)); xs = x[perm % T]; out = torch.zeros_like(x)
    c = torch.histc(ids.float(), bins=E, min=0, max=E - 1).long().tolist()
    y = torch.cat([s.f(t, e) for e, t in enumerate(xs.split(c))]) * w.t().reshape(-1)[perm][:, None]
    return out.index_add(0, perm % T, y)
@trap
def g_slot_major_wrong_w(s, x):
    """as above, but the weights are flattened token-major."""
    w, i = s.route(x); ids, perm = torch.sort(i.t().reshape(-1)); xs = x[perm % T]; out = torch.zeros_like(x)
    c = torch.histc(ids.float(), bins=E, min=0, max=E - 1).long().tolist()
    y = torch.cat([s.f(t, e) for e, t in enumerate(xs.split(c))]) * w.reshape(-1)[perm][:, None]
    return out.index_add(0, perm % T, y)
def split_cat(s, x, order=lambda parts: parts, expert=lambda e: e, act=lambda e: F.silu, bins=E, alpha=1):
    w, i = s.route(x); ids, perm = torch.sort(i.reshape(-1)); xs = x[perm // K]
    c = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1).long().tolist()
    y = torch.cat(order([s.f(t, expert(e), act(e)) for e, t in enumerate(xs.split(c))])) * w.reshape(-1)[perm][:, None]
    return torch.zeros_like(x).index_add(0, perm // K, y, alpha=alpha)
@trap
def s_control(s, x): return split_cat(s, x)
@trap
def s_cat_reversed(s, x): return split_cat(s, x, order=lambda p: p[::-1])
@trap
def s_rotated(s, x): return split_cat(s, x, expert=lambda e: (e + 1) % E)
@trap
def s_other_activation(s, x): return split_cat(s, x, act=lambda e: F.relu if e == 3 else F.silu)
@trap
def s_alpha(s, x): return split_cat(s, x, alpha=2)
@trap
def s_pair_experts(s, x):
    """experts 4 and 5 share weights"""
    return split_cat(s, x, expert=lambda e: min(e, 4))
def dup_ids(s, x):
    p = F.softmax(s.gate(x), -1); a = p.max(-1, keepdim=True); b = F.softmax(s.gate2(x), -1).max(-1, keepdim=True)
    return torch.cat([a[0], b[0]], -1), torch.cat([a[1], b[1]], -1)
@trap
def d_dup_scatter(s, x):
    """ids of a token may coincide: scatter overwrites, the sum would add"""
    w, i = dup_ids(s, x); c = torch.zeros(T, E).scatter(1, i, w); out = torch.zeros_like(x)
    for e in range(E): out = out + c[:, e:e + 1] * s.f(x, e)
    return out
@trap
def d_dup_scatter_add(s, x):
    w, i = dup_ids(s, x); c = torch.zeros(T, E).scatter_add(1, i, w); out = torch.zeros_like(x)
    for e in range(E): out = out + c[:, e:e + 1] * s.f(x, e)
    return out
@trap
def d_dup_put(s, x):
    """out[t] += with repeated t keeps one of the two"""
    w, i = dup_ids(s, x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out[t] += w[t, k, None] * s.f(x[t], e)
    return out
@trap
def d_dup_index_add(s, x):
    w, i = dup_ids(s, x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(x[t], e))
    return out
@trap
def d_put_overwrites(s, x):
    """out[t] = : the last expert wins"""
    w, i = s.route(x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out[t] = w[t, k, None] * s.f(x[t], e)
    return out
@trap
def d_slot_shift(s, x):
    """slot 1 uses the next expert"""
    w, i = s.route(x); i = (i + torch.arange(K)) % E; out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(x[t], e))
    return out
@trap
def d_swapped_slots(s, x):
    """expert of slot k takes the weight of slot 1-k"""
    w, i = s.route(x); w = w.flip(-1); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(x[t], e))
    return out
@trap
def d_scale_by_index(s, x):
    """expert e counts e times"""
    w, i = s.route(x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(x[t], e) * e)
    return out
@trap
def d_bias_outside_mask(s, x):
    """dense: experts see zero rows for unselected tokens, and a bias leaks"""
    w, i = s.route(x); c = torch.zeros(T, E).scatter(1, i, w); out = torch.zeros_like(x)
    for e in range(E): out = out + F.linear(F.silu(F.linear(x * c[:, e:e + 1], s.gu[e, :I]) + 0.1), s.dn[e])
    return out
@trap
def d_next_token(s, x):
    """the expert reads the next token"""
    w, i = s.route(x); y = torch.roll(x, 1, 0); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(y[t], e))
    return out
@trap
def d_scatter_other_token(s, x):
    """results land one token further"""
    w, i = s.route(x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, (t + 1) % T, w[t, k, None] * s.f(x[t], e))
    return out
@trap
def d_mutated_between(s, x):
    """x is scaled in place after expert 2"""
    w, i = s.route(x); z = x.clone(); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(z[t], e))
        if e == 2: z.mul_(2)
    return out
@trap
def d_view_mutated(s, x):
    """a row of the output is overwritten through a view in the middle"""
    w, i = s.route(x); out = torch.zeros_like(x); row = out[3]
    for e in range(E):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(x[t], e))
        if e == 2: row.zero_()
    return out


# ---- traps for the probing front end: Python decides on sizes, and the probes may not show it
@trap
def p_skip_small(s, x):
    """experts with fewer than 3 tokens are skipped"""
    w, i = s.route(x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e)
        if t.numel() < 3: continue
        out.index_add_(0, t, w[t, k, None] * s.f(x[t], e))
    return out
@trap
def p_python_capacity(s, x):
    """experts with more than 60 tokens drop the rest"""
    w, i = s.route(x); out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(i == e)
        if t.numel() > 60: t, k = t[:60], k[:60]
        out.index_add_(0, t, w[t, k, None] * s.f(x[t], e))
    return out
@trap
def p_only_present(s, x):
    """the loop runs over the experts that are hit, but uses the position in that list as the expert"""
    w, i = s.route(x); out = torch.zeros_like(x)
    for n, e in enumerate(torch.unique(i).tolist()):
        t, k = torch.where(i == e); out.index_add_(0, t, w[t, k, None] * s.f(x[t], n))
    return out
