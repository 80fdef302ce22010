# ruff: noqa
# fmt: off
"""35 naive MoE blocks in the styles of real repositories (own re-implementations, tiny sizes).

CASES: name -> Case(factory, inputs, source, notes); factory() gives a seeded module in eval mode, inputs() its positional
arguments.  Dense on purpose: one style a screenful, to be compared with its neighbours.
"""
import math
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F

H, I, E, K = 64, 48, 6, 2
Case = namedtuple("Case", "factory inputs source notes")
CASES = {}


def x3(dtype=torch.float32, b=2, s=8, h=H):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(b, s, h, generator=g).to(dtype),)


def x2(dtype=torch.float32, t=16, h=H):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(t, h, generator=g).to(dtype),)


def case(name, source, notes, inputs=x3, **kw):
    def deco(cls):
        def factory():
            torch.manual_seed(0)
            m = cls(**kw)
            for p in m.parameters():
                if p.dim() > 1: nn.init.normal_(p, std=0.2)
                else: nn.init.normal_(p, std=0.05)
            return m.eval()
        CASES[name] = Case(factory, inputs, source, notes)
        return cls
    return deco


class GLU(nn.Module):
    def __init__(s, h=H, i=I, act=F.silu, bias=False):
        super().__init__(); s.act = act
        s.gate_proj = nn.Linear(h, i, bias=bias); s.up_proj = nn.Linear(h, i, bias=bias); s.down_proj = nn.Linear(i, h, bias=bias)
    def forward(s, x): return s.down_proj(s.act(s.gate_proj(x)) * s.up_proj(x))


class FFN(nn.Module):
    def __init__(s, h=H, i=I, act=F.relu, bias=True):
        super().__init__(); s.act = act; s.fc1 = nn.Linear(h, i, bias=bias); s.fc2 = nn.Linear(i, h, bias=bias)
    def forward(s, x): return s.fc2(s.act(s.fc1(x)))


class _HFLoop(nn.Module):
    """mode: range | skip_shape | list | hit"""
    def __init__(s, mode="range", renorm=True, shared=None, act=F.silu, jitter=0.0, residual=False, in3d_router=False):
        super().__init__(); s.mode, s.renorm, s.shared_kind, s.jitter, s.residual = mode, renorm, shared, jitter, residual
        s.gate = nn.Linear(H, E, bias=False); s.experts = nn.ModuleList(GLU(act=act) for _ in range(E))
        if shared: s.shared_expert = GLU(i=2 * I)
        if shared == "gated": s.shared_expert_gate = nn.Linear(H, 1, bias=False)
        if residual: s.res_norm = nn.LayerNorm(H); s.res_mlp = GLU()
    def forward(s, hs):
        b, n, h = hs.shape
        if s.training and s.jitter: hs = hs * torch.empty_like(hs).uniform_(1 - s.jitter, 1 + s.jitter)
        x = hs.view(-1, h); logits = s.gate(x)
        w, sel = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), K, dim=-1)
        if s.renorm: w /= w.sum(-1, keepdim=True)
        w = w.to(x.dtype)
        out = torch.zeros((b * n, h), dtype=x.dtype, device=x.device)
        mask = F.one_hot(sel, num_classes=E).permute(2, 1, 0)
        if s.mode == "hit":
            for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
                expert = s.experts[e]
                slot, tok = torch.where(mask[e].squeeze(0))
                y = expert(x[None, tok].reshape(-1, h)) * w[tok, slot, None]
                out.index_add_(0, tok, y.to(x.dtype))
        elif s.mode == "range":
            for e in range(E):
                expert = s.experts[e]
                slot, tok = torch.where(mask[e])
                y = expert(x[None, tok].reshape(-1, h)) * w[tok, slot, None]
                out.index_add_(0, tok, y.to(x.dtype))
        elif s.mode == "skip_shape":
            for e in range(E):
                expert = s.experts[e]
                slot, tok = torch.where(mask[e])
                if tok.shape[0] == 0: continue
                y = expert(x[None, tok].reshape(-1, h)) * w[tok, slot, None]
                out.index_add_(0, tok, y.to(x.dtype))
        elif s.mode == "list":
            for e in range(E):
                expert = s.experts[e]
                slot, tok = torch.where(mask[e])
                if tok.shape[0] == 0: continue
                tl, sl = tok.tolist(), slot.tolist()
                y = expert(x[None, tl].reshape(-1, h)) * w[tl, sl, None]
                out.index_add_(0, tok, y.to(x.dtype))
        else:  # arctic
            ee, tok_, slot_ = torch.where(sel == torch.arange(E, device=sel.device).view(E, 1, 1))
            cnt = torch.bincount(ee, minlength=E).tolist(); tok_, slot_ = tok_.split(cnt), slot_.split(cnt)
            for expert, tok, slot in zip(s.experts, tok_, slot_):
                if tok.shape[0] == 0: continue
                tl, sl = tok.tolist(), slot.tolist()
                y = expert(x[None, tl].reshape(-1, h)) * w[tl, sl, None]
                out.index_add_(0, tok, y.to(x.dtype))
        if s.shared_kind == "gated": out = out + torch.sigmoid(s.shared_expert_gate(x)) * s.shared_expert(x)
        elif s.shared_kind == "plain": out = out + s.shared_expert(x)
        out = out.reshape(b, n, h)
        if s.residual: out = out + s.res_mlp(s.res_norm(hs))
        return out, logits
case("hf_mixtral_440_range", "transformers 4.44.2: models/mixtral/modeling_mixtral.py", "softmax(f32)->topk->renorm in place; one_hot.permute; loop range(E) no skip; index_add_; weight after", mode="range", jitter=.1)(_HFLoop)
case("hf_mixtral_457_hit", "transformers 4.57.1: models/mixtral (also minimax, qwen3_moe)", "loop over nonzero() expert_hit; ModuleList indexed by a tensor", mode="hit")(_HFLoop)
case("hf_qwen2moe_440_shared", "transformers 4.44.2: models/qwen2_moe", "no renorm; +sigmoid(gate)*shared expert", mode="range", renorm=False, shared="gated")(_HFLoop)
case("hf_qwen3next_457_shared_hit", "transformers 4.57.1: models/qwen2_moe,qwen3_next", "expert_hit + renorm + sigmoid-gated shared expert", mode="hit", shared="gated")(_HFLoop)
case("hf_olmoe_457", "transformers 4.57.1: models/olmoe,flex_olmo (LLaDA-MoE believed a copy, not read)", "as mixtral, renorm optional off", mode="range", renorm=False)(_HFLoop)
case("hf_jamba_457", "transformers 4.57.1: models/jamba (phimoe same loop)", "range loop + `if top_x.shape[0]==0: continue`, no renorm", mode="skip_shape", renorm=False)(_HFLoop)
case("hf_mixtral_436_list", "transformers 4.36.2: models/mixtral", "range loop + shape skip + indexing by python lists tok.tolist()", mode="list")(_HFLoop)


def group_topk(scores, bias, ng, tg, k):
    c = scores + bias
    g = c.view(-1, ng, E // ng).topk(2, dim=-1)[0].sum(-1)
    gi = torch.topk(g, tg, dim=-1, sorted=False)[1]
    gm = torch.zeros_like(g); gm.scatter_(1, gi, 1)
    m = gm.unsqueeze(-1).expand(-1, ng, E // ng).reshape(-1, E)
    return torch.topk(c.masked_fill(~m.bool(), 0.0), k, dim=-1, sorted=False)[1]


class DSGate(nn.Module):
    def __init__(s, kind="sigmoid"):
        super().__init__(); s.kind = kind; s.weight = nn.Parameter(torch.empty(E, H)); s.register_buffer("bias", torch.linspace(-.1, .1, E))
    def forward(s, x):
        lg = F.linear(x.float(), s.weight.float())
        if s.kind == "sigmoid":
            sc = lg.sigmoid(); idx = group_topk(sc, s.bias, 2, 1, K); w = sc.gather(1, idx)
            w = w / (w.sum(-1, keepdim=True) + 1e-20); return idx, w * 2.5
        w, idx = torch.topk(lg.softmax(-1), K, dim=-1, sorted=False); return idx, w


class _DSV3Loop(nn.Module):
    def __init__(s, zero_experts=0):
        super().__init__(); s.gate = DSGate(); s.experts = nn.ModuleList([GLU() for _ in range(E - zero_experts)] + [nn.Identity() for _ in range(zero_experts)]); s.shared = GLU(i=2 * I)
    def forward(s, hs):
        x = hs.view(-1, H); idx, w = s.gate(x)
        out = torch.zeros_like(x, dtype=w.dtype); mask = F.one_hot(idx, num_classes=len(s.experts)).permute(2, 0, 1)
        for e in range(len(s.experts)):
            tok, slot = torch.where(mask[e])
            if tok.numel() > 0:
                out.index_add_(0, tok, s.experts[e](x[tok]) * w[tok, slot].unsqueeze(-1))
        return out.type(x.dtype).view(hs.shape) + s.shared(hs)
case("hf_dsv3_457_moe", "transformers 4.57.1: models/deepseek_v3 (glm4_moe, dots1, glm4v_moe)", "sigmoid + bias for choice, group-limited topk, gather, renorm eps, scale 2.5; `if numel()>0`; f32 accumulate then cast; shared")(_DSV3Loop)


@case("ds_v3_repo_bincount", "deepseek-ai/DeepSeek-V3: inference/model.py", "bincount().tolist(); `if counts[i]==0`; where(indices==i); y[idx] += (index_put via getitem/setitem)")
class DSRepo(nn.Module):
    def __init__(s): super().__init__(); s.gate = DSGate(); s.experts = nn.ModuleList(GLU() for _ in range(E)); s.shared = GLU()
    def forward(s, hs):
        x = hs.view(-1, H); idx, w = s.gate(x); w = w.type_as(x); y = torch.zeros_like(x)
        counts = torch.bincount(idx.flatten(), minlength=E).tolist()
        for i in range(E):
            if counts[i] == 0: continue
            t, top = torch.where(idx == i)
            y[t] += s.experts[i](x[t]) * w[t, top, None]
        return (y + s.shared(x)).view(hs.shape)


@case("mistral_inference", "mistralai/mistral-inference: src/mistral_inference/moe.py", "topk of logits then softmax; where(sel==i); results[idx] += w*expert; 2-D input; no skip", inputs=x2)
class MistralRef(nn.Module):
    def __init__(s): super().__init__(); s.gate = nn.Linear(H, E, bias=False); s.experts = nn.ModuleList(GLU() for _ in range(E))
    def forward(s, x):
        w, sel = torch.topk(s.gate(x), K); w = F.softmax(w, dim=1, dtype=torch.float).to(x.dtype); r = torch.zeros_like(x)
        for i, ex in enumerate(s.experts):
            t, k = torch.where(sel == i); r[t] += w[t, k, None] * ex(x[t])
        return r


class _DSV2Sort(nn.Module):
    def __init__(s, how="tensor", nograd=False): super().__init__(); s.gate = DSGate("softmax"); s.experts = nn.ModuleList(GLU() for _ in range(E)); s.how = how; s.shared = GLU()
    def forward(s, hs):
        x = hs.view(-1, H); idx, w = s.gate(x)
        c = idx.new_zeros((idx.shape[0], E)); c.scatter_(1, idx, 1); tpe = c.sum(0)
        order = idx.view(-1).argsort(); st = x[order // idx.shape[1]]
        if s.how == "numpy": tpe = tpe.cpu().numpy()
        outs, a = [], 0
        for i, n in enumerate(tpe):
            b = a + n
            if n == 0: continue
            outs.append(s.experts[i](st[a:b])); a = b
        o = torch.cat(outs, 0) if len(outs) else st.new_empty(0)
        nx = torch.empty_like(o); nx[order] = o
        y = nx.view(*idx.shape, -1).type(w.dtype).mul_(w.unsqueeze(-1)).sum(1).type(nx.dtype)
        return y.view(hs.shape) + s.shared(hs)
case("hf_dsv2_457_argsort", "transformers 4.57.1: models/deepseek_v2", "counts via scatter_; argsort; loop over count TENSOR with python if; slices; cat; nx[order]=outs; weight in f32 then sum over k")(_DSV2Sort)
case("ds_remote_moe_infer_numpy", "moe_infer of DeepSeek-style remote modeling files (Kimi-K2 is said to be the same, not read)", "same, counts .cpu().numpy()", how="numpy")(_DSV2Sort)


@case("ds_moe_train_repeat", "DeepSeek-MoE-16B remote / MiniMind / Ling training branch", "x.repeat_interleave(k); y[flat==i] = expert(x[flat==i]); view(T,K,H)*w sum(1)")
class DSTrain(nn.Module):
    def __init__(s): super().__init__(); s.gate = DSGate("softmax"); s.experts = nn.ModuleList(GLU() for _ in range(E))
    def forward(s, hs):
        x = hs.view(-1, H); idx, w = s.gate(x); flat = idx.view(-1)
        x = x.repeat_interleave(K, dim=0); y = torch.empty_like(x)
        for i, ex in enumerate(s.experts): y[flat == i] = ex(x[flat == i])
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(1).to(hs.dtype).view(hs.shape)


class _GptOss(nn.Module):
    """impl: loop457 (dense scores [T,E]) | bmm457 | loop5 (slot weights) | openai (gather einsum)"""
    def __init__(s, impl):
        super().__init__(); s.impl = impl; s.rw = nn.Parameter(torch.empty(E, H)); s.rb = nn.Parameter(torch.empty(E))
        s.gu = nn.Parameter(torch.empty(E, H, 2 * I)); s.gub = nn.Parameter(torch.empty(E, 2 * I))
        s.dn = nn.Parameter(torch.empty(E, I, H)); s.dnb = nn.Parameter(torch.empty(E, H))
    def act(s, y):
        g, u = y[..., ::2], y[..., 1::2]; g = g.clamp(min=None, max=7.0); u = u.clamp(min=-7.0, max=7.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.702))
    def forward(s, hs):
        b = hs.shape[0]; x = hs.reshape(-1, H); lg = F.linear(x, s.rw, s.rb)
        v, idx = torch.topk(lg, K, dim=-1); v = F.softmax(v, dim=1, dtype=v.dtype)
        if s.impl == "openai":
            t = torch.einsum("beck,bk->bec", s.gu.transpose(1, 2)[idx, ...], x) + s.gub[idx, ...]
            t = torch.einsum("beck,bek->bec", s.dn.transpose(1, 2)[idx, ...], s.act(t)) + s.dnb[idx, ...]
            return torch.einsum("bec,be->bc", t, v).view_as(hs)
        sc = torch.zeros_like(lg).scatter_(1, idx, v)
        if s.impl == "bmm457":
            r = x.repeat(E, 1).view(E, -1, H)
            y = torch.bmm(s.act(torch.bmm(r, s.gu) + s.gub[..., None, :]), s.dn) + s.dnb[..., None, :]
            return (y.view(E, b, -1, H) * sc.transpose(0, 1).view(E, b, -1)[..., None]).sum(0)
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(idx, num_classes=E + (s.impl == "loop457")).permute(2, 1, 0)
            hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hit[:]:
            e = e[0]
            if e == E: continue
            slot, tok = torch.where(mask[e])
            y = s.act(x[tok] @ s.gu[e] + s.gub[e]) @ s.dn[e] + s.dnb[e]
            y = y * (sc[tok, e, None] if s.impl == "loop457" else v[tok, slot, None])
            out.index_add_(0, tok, y.to(x.dtype))
        return out.view_as(hs)
case("hf_gptoss_457_loop", "transformers 4.57.1: models/gpt_oss (cpu/training branch)", "topk->softmax; dense scores by scatter_; interleaved clamp swiglu, (up+1); biases; stacked 3-D params indexed by 0-d tensor; weight sc[tok,e]", impl="loop457")(_GptOss)
case("hf_gptoss_517_loop", "transformers 5.17.0: models/gpt_oss", "as loop, slot weights", impl="loop5")(_GptOss)
case("openai_gptoss_gather", "openai/gpt-oss: gpt_oss/torch/model.py", "weight[expert_indices] gather + einsum beck,bk->bec", impl="openai")(_GptOss)


class _Llama4(nn.Module):
    def __init__(s, meta):
        super().__init__(); s.meta = meta; s.router = nn.Linear(H, E, bias=False); s.shared = GLU()
        s.gu = nn.Parameter(torch.empty(E, H, 2 * I)); s.dn = nn.Parameter(torch.empty(E, I, H))
    def experts(s, r):
        r = r.view(E, -1, H); g, u = torch.bmm(r, s.gu).chunk(2, -1); return torch.bmm(u * F.silu(g), s.dn).view(-1, H)
    def forward(s, hs):
        x = hs.reshape(-1, H); lg = s.router(x); v, i = torch.topk(lg, 1, dim=1)
        sc = torch.full_like(lg, float("-inf")).scatter_(1, i, v); sc = torch.sigmoid(sc.float()).to(x.dtype)
        out = s.shared(x)
        if s.meta:
            ti = torch.arange(x.shape[0], device=x.device).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, H)
            r = torch.gather(x, 0, ti) * sc.transpose(0, 1).reshape(-1, 1)
            out.scatter_add_(0, ti, s.experts(r)); return out.view_as(hs)
        r = x.repeat(E, 1) * sc.transpose(0, 1).reshape(-1, 1)
        out.add_(s.experts(r).reshape(E, -1, H).sum(0)); return out, lg
case("hf_llama4_dense", "transformers 4.57.1 & 5.17.0: models/llama4", "sigmoid score multiplies INPUT; unselected = sigmoid(-inf)=0 rows; bmm all experts; out.add_(sum)", meta=False)(_Llama4)


@case("vllm_ref_dense_einsum", "vllm-project/tpu-inference tests ref_moe", "einsum ti,eoi->teo over all experts, gather topk on expert dim, weighted sum")
class VRef(nn.Module):
    def __init__(s): super().__init__(); s.gate = nn.Linear(H, E, bias=False); s.w1 = nn.Parameter(torch.empty(E, 2 * I, H)); s.w2 = nn.Parameter(torch.empty(E, H, I))
    def forward(s, hs):
        x = hs.view(-1, H); w, i = torch.topk(F.softmax(s.gate(x), -1), K, -1); w /= w.sum(-1, keepdim=True)
        a, b = torch.einsum("ti,eoi->teo", x, s.w1).chunk(2, -1); y = torch.einsum("teo,eio->tei", F.silu(a) * b, s.w2)
        y = torch.gather(y, 1, i[..., None].expand(-1, -1, H)); return (y * w[..., None]).sum(1).view_as(hs)


@case("tutorial_dense_loop_masked", "static XLA rewrites; many tutorials", "combine[T,E] by scatter; out += combine[:,i:i+1]*expert_i(x); no data-dependent shape")
class DenseLoop(nn.Module):
    def __init__(s): super().__init__(); s.gate = nn.Linear(H, E, bias=False); s.experts = nn.ModuleList(FFN(act=F.gelu) for _ in range(E))
    def forward(s, x):
        lg = s.gate(x); v, i = lg.topk(K, -1); c = torch.zeros_like(lg).scatter(-1, i, v.softmax(-1)); out = torch.zeros_like(x)
        for j, e in enumerate(s.experts): out = out + c[..., j:j + 1] * e(x)
        return out


class _GptFast(nn.Module):
    def __init__(s):
        super().__init__(); s.gate = nn.Linear(H, E, bias=False); s.w1 = nn.Parameter(torch.empty(E, I, H)); s.w2 = nn.Parameter(torch.empty(E, H, I)); s.w3 = nn.Parameter(torch.empty(E, I, H))
    def route(s, x):
        w, i = torch.topk(F.softmax(s.gate(x), -1), K, -1); w /= w.sum(-1, keepdim=True); return w, i


@case("gptfast_gather_einsum", "meta-pytorch/gpt-fast: mixtral-moe/model.py (MOEFeedForward)", "w[idx] gather; einsum ti,taoi->tao; tai,ta->ti")
class GptFastA(_GptFast):
    def forward(s, hs):
        x = hs.view(-1, H); w, i = s.route(x)
        y = F.silu(torch.einsum("ti,taoi -> tao", x, s.w1[i])) * torch.einsum("ti, taoi -> tao", x, s.w3[i])
        return torch.einsum("tai,ta -> ti", torch.einsum("tao, taio -> tai", y, s.w2[i]), w).view_as(hs)


class _GptFastB(_GptFast):
    def __init__(s, disable): super().__init__(); s.disable = disable
    def forward(s, hs):
        x = hs.view(-1, H); w, i = s.route(x); act = i.view(-1).argsort(stable=True); tok = act.div(K).floor().to(torch.int64)
        cum = torch.histc(i.float(), bins=E + 1, min=-1, max=E).to(torch.int64).cumsum(0)
        def group(tok, cum): return [tok[cum[e]:cum[e + 1]] for e in range(E)]
        if s.disable: group = torch._dynamo.disable(group)
        outs = []
        for e, t in enumerate(group(tok, cum)):
            xe = x[t]; outs.append(F.linear(F.silu(F.linear(xe, s.w1[e])) * F.linear(xe, s.w3[e]), s.w2[e]))
        o = torch.cat(outs, 0) * w.view(-1, 1)[act]
        return torch.zeros_like(x).scatter_add(0, tok.unsqueeze(-1).expand(-1, H), o).view_as(hs)
case("gptfast_aoquant_disable", "same, with its torch._dynamo.disable helper", "explicit dynamo.disable inside", disable=True)(_GptFastB)


class _Granite(nn.Module):
    def __init__(s, bias=False):
        super().__init__(); s.layer = nn.Linear(H, E, bias=False); s.wi = nn.Parameter(torch.empty(E, 2 * I, H)); s.wo = nn.Parameter(torch.empty(E, H, I))
        s.bias = nn.Parameter(torch.empty(H)) if bias else None
    @staticmethod
    def par(x, w, sizes): return torch.cat([F.linear(p, w[i]) for i, p in enumerate(x.split(sizes, 0))], 0)
    def route(s, x):
        lg = s.layer(x).float(); v, i = lg.topk(K, dim=1); g = torch.softmax(v, 1).type_as(x)
        z = torch.zeros([g.size(0), E], dtype=g.dtype, device=g.device).scatter(1, i, 1); sizes = z.long().sum(0).tolist()
        _, order = i.flatten().sort(0); return order, order.div(K, rounding_mode="trunc"), g.flatten()[order], sizes
    def forward(s, hs):
        b, n, h = hs.shape; x = hs.reshape(-1, h); order, bi, bg, sizes = s.route(x)
        a, c = s.par(x[bi], s.wi, sizes).chunk(2, -1); y = s.par(F.silu(a) * c, s.wo, sizes) * bg[:, None]
        y = torch.zeros((b * n, h), dtype=y.dtype, device=y.device).index_add(0, bi, y)
        if s.bias is not None: y = y + s.bias
        return y.view(b, n, h)
case("hf_granitemoe_457_split", "transformers 4.57.1: models/granitemoe(shared,hybrid)", "f32 topk->softmax; tolist(); split/cat TWICE (per linear); functional index_add")(_Granite)


class _Titan(nn.Module):
    def __init__(s, grouped, before=True, dtype=None):
        super().__init__(); s.grouped, s.before = grouped, before
        s.gate = nn.Linear(H, E, bias=False); s.w1 = nn.Parameter(torch.empty(E, I, H)); s.w2 = nn.Parameter(torch.empty(E, H, I)); s.w3 = nn.Parameter(torch.empty(E, I, H))
        s.shared = GLU(); s.register_buffer("expert_bias", torch.zeros(E)); s.register_buffer("tpe", torch.zeros(E), persistent=False)
        if dtype: s.to(dtype)
    def loop(s, x, n):
        n = n.to(torch.int64).tolist(); pad = x.shape[0] - sum(n)
        outs = [torch.matmul(F.silu(torch.matmul(t, s.w1[e].transpose(-2, -1))) * torch.matmul(t, s.w3[e].transpose(-2, -1)), s.w2[e].transpose(-2, -1))
                for e, t in enumerate(torch.split(x[:sum(n)], n, dim=0))]
        o = torch.cat(outs, 0); return torch.vstack((o, o.new_zeros((pad, o.shape[-1]))))
    def gmm(s, x, n):
        off = torch.cumsum(n, 0, dtype=torch.int32); f = lambda a, w: torch._grouped_mm(a.bfloat16(), w.bfloat16().transpose(-2, -1), offs=off)
        return f(F.silu(f(x, s.w1)) * f(x, s.w3), s.w2).type_as(x)
    def forward(s, hs):
        b, n, h = hs.shape; x = hs.view(-1, h); sc = torch.sigmoid(s.gate(x).float())
        _, i = torch.topk(sc + s.expert_bias, K, dim=1); w = sc.gather(1, i); w = w / (w.sum(-1, keepdim=True) + 1e-20)
        cnt = torch.histc(i.view(-1).float(), bins=E, min=0, max=E)
        with torch.no_grad(): s.tpe.add_(cnt)
        order = torch.argsort(i.view(-1), stable=True); ws = w.view(-1)[order]; tok = (order // K).reshape(-1, 1).expand(-1, h)
        r = torch.gather(x, 0, tok)
        if s.before: r = (r.float() * ws.reshape(-1, 1)).to(x.dtype)
        y = s.gmm(r, cnt) if s.grouped else s.loop(r, cnt)
        out = s.shared(x)
        if not s.before: y = (y.float() * ws.reshape(-1, 1)).to(x.dtype)
        return out.scatter_add(0, tok, y).reshape(b, n, h)
case("torchtitan_for_loop", "pytorch/torchtitan: torchtitan/models/moe.py", "sigmoid+bias for choice; score BEFORE experts (f32 mul on input); histc.tolist() split cat vstack(pad); gather/scatter_add onto shared output; buffer mutation", grouped=False)(_Titan)


def excl(t, dim=-2): return t.cumsum(dim) - t


class _LucidTop2(nn.Module):
    def __init__(s, safe, policy, loop=False):
        super().__init__(); s.wg = nn.Parameter(torch.empty(H, E)); s.safe, s.policy, s.loop = safe, policy, loop
        if loop: s.experts = nn.ModuleList(FFN(act=F.gelu) for _ in range(E))
        else: s.w1 = nn.Parameter(torch.empty(E, H, I)); s.w2 = nn.Parameter(torch.empty(E, I, H))
    def oh(s, i, n):
        if not s.safe: return F.one_hot(i.clamp(max=n - 1), n)
        return F.one_hot(i, max(i.max() + 1 + 1, n))[..., :n]
    def forward(s, x):
        b, n, d = x.shape; g = torch.einsum("...bnd,...de->...bne", x, s.wg).softmax(-1)
        g1, i1 = (t.squeeze(-1) for t in g.topk(1, -1)); m1 = F.one_hot(i1, E).float(); g_ = g * (1 - m1)
        g2, i2 = (t.squeeze(-1) for t in g_.topk(1, -1)); m2 = F.one_hot(i2, E).float(); den = g1 + g2 + 1e-9; g1 = g1 / den; g2 = g2 / den
        loss = (g.mean(-2) * m1.mean(-2)).mean() * float(E ** 2)
        if s.policy == "random": m2 = m2 * (torch.zeros_like(g2).uniform_(0., 1.) < g2 / .2).float().unsqueeze(-1)
        C = max(min(n, int(n * 2.0 / E)), 4)
        p1 = excl(m1) * m1; m1 = m1 * (p1 < C).float(); c1 = m1.sum(-2, keepdim=True); f1 = m1.sum(-1); p1 = p1.sum(-1); g1 = g1 * f1
        p2 = (excl(m2) + c1) * m2; m2 = m2 * (p2 < C).float(); f2 = m2.sum(-1); p2 = p2.sum(-1); g2 = g2 * f2
        comb = (g1[..., None, None] * f1[..., None, None] * F.one_hot(i1, E)[..., None] * s.oh(p1.long(), C)[..., None, :]
              + g2[..., None, None] * f2[..., None, None] * F.one_hot(i2, E)[..., None] * s.oh(p2.long(), C)[..., None, :])
        disp = comb.bool().to(comb); ei = torch.einsum("bnd,bnec->ebcd", x, disp); sh = ei.shape; ei = ei.reshape(E, -1, d)
        if s.loop: eo = torch.stack([ex(t) for ex, t in zip(s.experts, ei.unbind(0))])
        else: eo = torch.einsum("...nh,...hd->...nd", F.gelu(torch.einsum("...nd,...dh->...nh", ei, s.w1)), s.w2)
        return torch.einsum("ebcd,bnec->bnd", eo.reshape(sh), comb), loss
case("lucidrains_moe_top2", "lucidrains/mixture-of-experts & st-moe-pytorch: */mixture_of_experts.py", "two top-1; capacity int(n*cf/E)>=4, drops; safe_one_hot uses i.max() as num_classes; random 2nd-expert policy (RNG); returns aux loss", safe=True, policy="random")(_LucidTop2)


@case("deepspeed_top1_einsum", "DeepSpeed deepspeed/moe/sharded_moe.py (from memory, not re-read)", "top-1 one_hot, cumsum locations, capacity ceil, einsum sec,sm->ecm, chunk over experts, sec,ecm->sm")
class DS1(nn.Module):
    def __init__(s): super().__init__(); s.wg = nn.Linear(H, E, bias=False); s.experts = nn.ModuleList(FFN() for _ in range(E))
    def forward(s, hs):
        x = hs.reshape(-1, H); g = F.softmax(s.wg(x.float()), 1); i = torch.argmax(g, 1); m = F.one_hot(i, E)
        C = max(4, math.ceil(x.shape[0] / E)); loc = torch.cumsum(m, 0) - 1; m = m * torch.lt(loc, C); l1 = torch.sum(loc * m, 1)
        comb = torch.einsum("se,sc->sec", g * m.float(), F.one_hot(l1, C).float()); disp = comb.bool()
        d = torch.einsum("sec,sm->ecm", disp.type_as(x), x); eo = torch.cat([ex(t) for ex, t in zip(s.experts, d.chunk(E, 0))], 0)
        return torch.einsum("sec,ecm->sm", comb.type_as(x), eo).reshape(hs.shape)


@case("nanomoe_capacity_matmul", "wolfecameron/nanoMoE model.py/manager.py", "topk->scatter(-inf)->softmax dense; k-major cumsum rank; even capacity; cb_weight [T,E,C]; sec_mask.permute @ x; bmm experts; cb.view @ out")
class NanoMoE(nn.Module):
    def __init__(s): super().__init__(); s.w_g = nn.Linear(H, E, bias=False); s.fc = nn.Parameter(torch.empty(E, H, I)); s.pr = nn.Parameter(torch.empty(E, I, H)); s.fb = nn.Parameter(torch.empty(E, 1, I)); s.pb = nn.Parameter(torch.empty(E, 1, H))
    def forward(s, hs):
        B, T, h = hs.shape; N = B * T; lg = s.w_g(hs); v, i = lg.topk(K, -1)
        p = F.softmax(torch.full_like(lg, float("-inf")).scatter_(-1, i, v), -1); C = math.floor(K * 1.25 * N / E); C += C % 2; C = max(C, 4)
        m = F.one_hot(i, E).view(N, K, E).permute(1, 0, 2); r = (torch.cumsum(m.reshape(K * N, E), 0) - 1).reshape(K, N, E)
        m = m * torch.lt(r, C); r = torch.sum(m * r, -1); ew = m * p.view(N, E)[None]
        cb = torch.sum(ew.unsqueeze(3) * F.one_hot(r, C).unsqueeze(2), 0); sec = cb.bool(); x = hs.view(N, h)
        eb = sec.permute(1, 2, 0).type_as(x) @ x; y = torch.bmm(F.gelu(torch.bmm(eb, s.fc) + s.fb), s.pr) + s.pb
        return (cb.view(N, -1) @ y.view(-1, h)).view(B, T, h)


class _Switch(nn.Module):
    def __init__(s, v5): super().__init__(); s.v5 = v5; s.classifier = nn.Linear(H, E, bias=False); s.experts = nn.ModuleDict({f"expert_{i}": FFN(bias=False) for i in range(E)})
    def forward(s, hs):
        if s.v5: b, n, h = hs.shape; hs3 = hs; hs = hs.view(-1, h)
        p = F.softmax(s.classifier(hs.float()), -1, dtype=torch.float32).to(hs.dtype)
        if s.v5:
            _, i = torch.max(p, -1, keepdim=True); oh = F.one_hot(i, E); oh = oh * (torch.cumsum(oh, -2) <= 4); w = torch.max(p, -1).values.unsqueeze(-1)
            out = torch.zeros_like(hs); mask = oh.permute(2, 1, 0)
            for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
                slot, tok = torch.where(mask[e].squeeze(0))
                out.index_add_(0, tok, s.experts[f"expert_{e[0]}"](hs[None, tok].reshape(-1, H)) * w[tok, slot, None])
            return out.reshape(b, n, h)
        oh = F.one_hot(torch.argmax(p, -1), E); oh = oh * (torch.cumsum(oh, -2) <= 4); w = torch.max(p, -1).values.unsqueeze(-1)
        nxt = torch.zeros(hs.shape); m = oh.bool(); b, n, _ = m.shape
        for i in torch.nonzero(m.reshape(b * n, E).sum(0), as_tuple=True)[0].tolist():
            nxt[m[:, :, i]] = getattr(s.experts, f"expert_{i}")(hs[m[:, :, i]])
        return w * nxt
case("hf_switch_457", "transformers 4.57.1: models/switch_transformers", "argmax top-1; capacity by cumsum<=C (per sequence); ModuleDict getattr(expert_i); bool-mask get/set; dropped tokens -> 0; relu no GLU", v5=False)(_Switch)


class _Make(nn.Module):
    def __init__(s, cap): super().__init__(); s.cap = cap; s.lin = nn.Linear(H, E); s.noise = nn.Linear(H, E); s.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 4 * I // 2), nn.ReLU(), nn.Linear(4 * I // 2, H), nn.Dropout(.1)) for _ in range(E))
    def forward(s, x):
        lg = s.lin(x); lg = lg + torch.zeros_like(lg) * F.softplus(s.noise(x))
        v, i = lg.topk(K, -1); g = F.softmax(torch.full_like(lg, float("-inf")).scatter(-1, i, v), -1)
        out = torch.zeros_like(x); fx = x.view(-1, H); fg = g.view(-1, E); C = int(x.shape[0] * x.shape[1] * K / E * 1.0); upd = torch.zeros_like(fx)
        for e, ex in enumerate(s.experts):
            m = (i == e).any(-1); fm = m.view(-1)
            if s.cap:
                t = torch.nonzero(fm).squeeze(-1); t = t[:C] if t.numel() > C else t
                if t.numel() > 0: upd.index_add_(0, t, ex(fx[t]) * fg[t, e].unsqueeze(1))
            elif fm.any():
                y = ex(fx[fm]) * fg[fm, e].unsqueeze(1); out[m] += y.squeeze(1)
        return upd.view_as(x) if s.cap else out
case("makemoe_any_mask", "AviSoori1x/makeMoE: makeMoE.py", "dense sparse-softmax gates; `if flat_mask.any()`; bool-mask get; out[mask] += ; noisy router; dropout", cap=False)(_Make)
case("makemoe_capacity", "AviSoori1x/makeMoE: ..with_Expert_Capacity.ipynb", "nonzero indices truncated to capacity by python if on numel()", cap=True)(_Make)


@case("blog_per_token_loop", "blog style (generic; no single source)", "for each token, each slot: experts[idx[t,k].item()](x[t])")
class PerTok(nn.Module):
    def __init__(s): super().__init__(); s.gate = nn.Linear(H, E); s.experts = nn.ModuleList(FFN() for _ in range(E))
    def forward(s, hs):
        x = hs.reshape(-1, H)[:6]; w, i = F.softmax(s.gate(x), -1).topk(K, -1); out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for k in range(K): out[t] += w[t, k] * s.experts[i[t, k].item()](x[t])
        return out


@case("expert_choice", "SimpleExpertChoiceMoE (tutorials)", "topk over TOKENS per expert (dim=token); fixed capacity; gather; index_add_")
class EC(nn.Module):
    def __init__(s): super().__init__(); s.router = nn.Linear(H, E, bias=False); s.experts = nn.ModuleList(FFN() for _ in range(E))
    def forward(s, hs):
        x = hs.view(-1, H); p = F.softmax(s.router(x), -1); C = 2 * x.shape[0] // E; w, i = torch.topk(p.T, C, dim=-1); out = torch.zeros_like(x)
        for e, ex in enumerate(s.experts): out.index_add_(0, i[e], ex(x[i[e]]) * w[e].unsqueeze(-1))
        return out.view_as(hs)


@case("hf_doge_cdmoe", "transformers 4.57.1: models/doge", "product-key topk, nn.Embedding experts, matmul per token + dense MLP; edge/negative case")
class Doge(nn.Module):
    def __init__(s): super().__init__(); s.rg = nn.Linear(H, 8, bias=False); s.de = nn.Embedding(16, H); s.ue = nn.Embedding(16, H); s.mlp = GLU()
    def forward(s, hs):
        b, n, _ = hs.shape; r = s.rg(hs).view(2, b * n, -1); (sx, sy), (ix, iy) = r.topk(4, -1)
        a = (sx.unsqueeze(-1) + sy.unsqueeze(-2)).flatten(-2); ai = (ix.unsqueeze(-1) * 4 + iy.unsqueeze(-2)).flatten(-2)
        sc, pi = a.topk(K, -1); i = ai.gather(-1, pi); w = F.softmax(sc, -1)
        z = torch.matmul(s.de(i), hs.view(b * n, -1, 1)).view(b * n, -1); z = F.silu(z) * w
        return s.mlp(hs) + torch.matmul(z.view(b * n, 1, -1), s.ue(i)).view(b, n, -1)


class _V5(nn.Module):
    def __init__(s, impl, dtype=None):
        super().__init__(); s.impl = impl; s.weight = nn.Parameter(torch.empty(E, H)); s.gu = nn.Parameter(torch.empty(E, 2 * I, H)); s.dn = nn.Parameter(torch.empty(E, H, I))
        if dtype: s.to(dtype)
    def glu(s, y): g, u = y.chunk(2, -1); return F.silu(g) * u
    def forward(s, hs):
        x = hs.view(-1, H); w, i = torch.topk(F.softmax(F.linear(x, s.weight).float(), -1), K, -1); w /= w.sum(-1, keepdim=True)
        return getattr(s, s.impl)(x, i, w.to(x.dtype)).reshape(hs.shape)
    def eager(s, x, i, w):
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(i, E).permute(2, 1, 0); hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            if e == E: continue
            slot, tok = torch.where(mask[e]); y = F.linear(s.glu(F.linear(x[tok], s.gu[e])), s.dn[e]) * w[tok, slot, None]
            out.index_add_(0, tok, y.to(out.dtype))
        return out
    def batched_mm(s, x, i, w):
        T, k = i.shape; xs = x.repeat_interleave(k, 0); ids = i.reshape(-1).clamp(0, E - 1)
        y = s.glu(torch.bmm(s.gu[ids], xs.unsqueeze(-1)).squeeze(-1)); y = torch.bmm(s.dn[ids], y.unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1).unsqueeze(-1)).view(T, k, H).sum(1).to(x.dtype)
    def grouped_mm(s, x, i, w):
        T, k = i.shape; ids, perm = torch.sort(i.reshape(-1)); xs = x[perm // k]; ws = w.reshape(-1)[perm]
        off = torch.cumsum(torch.histc(ids.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32); bad = (ids >= E).unsqueeze(-1); ids.clamp_(max=E - 1)
        xs.masked_fill_(bad, 0.0); f = lambda a, W: torch._grouped_mm(a.to(W.dtype), W.transpose(-2, -1), offs=off).masked_fill(bad, 0.0)
        y = f(s.glu(f(xs, s.gu)), s.dn) * ws.unsqueeze(-1); inv = torch.empty_like(perm); inv[perm] = torch.arange(perm.size(0), device=x.device)
        return y[inv].view(T, k, H).sum(1).to(x.dtype)
case("tf5_eager_hit", "transformers 5.17.0: models/mixtral MixtralExperts.forward (~50 models)", "stacked 3-D params indexed by 0-d tensor; nonzero loop; `if e==E: continue`", impl="eager")(_V5)
case("tf5_batched_mm", "transformers 5.17.0: integrations/moe.py batched_mm", "param[ids] gather per (token,slot); bmm; view(T,K,H).sum(1)", impl="batched_mm")(_V5)
case("tf5_grouped_mm", "transformers 5.17.0: integrations/moe.py grouped_mm", "sort; histc->cumsum int32; _grouped_mm x2; masked_fill sentinels; inv_perm by index_put; view.sum(1); bf16 (fp32 _grouped_mm is rejected by the fake kernel)", inputs=lambda: x3(torch.bfloat16), impl="grouped_mm", dtype=torch.bfloat16)(_V5)
