"""Grammar of experts: how parameters are kept, what one expert computes, and how code reaches one, some or all of them."""

from __future__ import annotations

from fuzz.spec import Spec, indented

LISTS = ("list", "dict")
STORAGES = ("list", "stack_oi", "stack_io", "params", "dict")
BODIES = ("mlp", "glu_fused", "glu_split", "glu_interleaved", "glu_clamped")
ACTS = {
    "silu": "F.silu({})",
    "gelu": "F.gelu({})",
    "gelu_tanh": 'F.gelu({}, approximate="tanh")',
    "relu": "F.relu({})",
    "relu_squared": "F.relu({}).square()",
    "quick_gelu": "({0} * torch.sigmoid(1.702 * {0}))",
    "tanh": "torch.tanh({})",
}
ODD = 1  # the expert that mistakes about one expert change


def fused(s: Spec) -> bool:
    return s.body in ("glu_fused", "glu_interleaved", "glu_clamped")


def names(s: Spec) -> list[tuple[str, str, str]]:
    """(name, rows, columns) of the matrices [out, in] of an expert, the last one down."""
    up = [("up", "2 * I" if fused(s) else "I", "H")]
    return [*up, *([("gated", "I", "H")] if s.body == "glu_split" else []), ("down", "H", "I")]


# ---------------------------------------------------------------- one expert's function
def between(s: Spec, e: str | None) -> list[str]:
    """Lines from h (and g) to h, the rows that the down projection reads; e: the expert's number in the code, if it is one."""
    act = ACTS[s.act]
    lines = {
        "mlp": [f"h = {act.format('h')}"],
        "glu_split": [f"h = {act.format('g')} * h"],
        "glu_fused": ["g, u = h.chunk(2, dim=-1)", f"h = {act.format('g')} * u"],
        "glu_interleaved": ["g, u = h[..., ::2], h[..., 1::2]", f"h = {act.format('g')} * u"],
        "glu_clamped": ["g, u = h.chunk(2, dim=-1)", "g, u = g.clamp(max=0.7), u.clamp(-0.7, 0.7)", f"h = {act.format('g')} * (u + 1)"],
    }[s.body]
    return [*lines, *_changed_hidden(s, e)]


def _changed_hidden(s: Spec, e: str | None) -> list[str]:
    if s.mistake == "hidden_detached":
        return ["h = h.detach()"]
    if s.mistake == "rounded_inside":
        return ["h = h.bfloat16().to(h.dtype)"]
    if s.mistake == "act_one" and e:
        return [f"h = F.relu(h) if {e} == {ODD} else h"]
    return []


def leaving(s: Spec, e: str | None) -> list[str]:
    """Changes of y, what expert e gives for the rows x."""
    one = {"scaled_one": "y * 2", "residual_one": "y + x", "detached_one": "y.detach()"}
    if s.mistake in one and e:
        return [f"y = {one[s.mistake]} if {e} == {ODD} else y"]
    if s.mistake == "scaled_by_number" and e:
        return [f"y = y * {e}"]
    return ["y = y + 0.25"] if s.mistake == "constant_added" else []


def turned(s: Spec, e: str, name: str) -> str:
    """The index of expert e's matrix, which a mistake may turn."""
    m = s.mistake
    wrong = m == "expert_rotated" or (m == "down_rotated" and name == "down")
    return f"({e} + 1) % E" if wrong else f"min({e}, E - 2)" if m == "experts_share" and e == "e" else e


# ---------------------------------------------------------------- where parameters lie
def classes(s: Spec) -> list[str]:
    """The class of one expert, for lists and dicts of modules."""
    if s.storage not in LISTS:
        return []
    init = [f"self.{n} = nn.Linear({i}, {o}, bias={s.biases})" for n, o, i in names(s)]
    gate = ["g = self.gated(x)"] if s.body == "glu_split" else []
    number = "self.number" if s.mistake in ONE else None
    body = ["h = self.up(x)", *gate, *between(s, number), "y = self.down(h)", *leaving(s, number), "return y"]
    return [
        "class Expert(nn.Module):",
        *indented([f"def __init__(self{', number' if number else ''}):", "    super().__init__()"]),
        *indented([*(["self.number = number"] if number else []), *init], 2),
        "",
        *indented(["def forward(self, x):", *indented(body)]),
        "",
        "",
    ]


ONE = ("act_one", "scaled_one", "residual_one", "detached_one", "scaled_by_number")


def experts_init(s: Spec) -> list[str]:
    number = "e" if s.mistake in ONE else ""
    if s.storage == "list":
        return [f"self.experts = nn.ModuleList(Expert({number}) for {number or '_'} in range(E))"]
    if s.storage == "dict":
        return [f'self.experts = nn.ModuleDict({{f"expert_{{e}}": Expert({number}) for e in range(E)}})']
    lines = []
    for n, o, i in names(s):
        if s.storage == "params":
            lines.append(f"self.{n} = nn.ParameterList(nn.Parameter(torch.empty({o}, {i})) for _ in range(E))")
        else:
            shape = f"{o}, {i}" if s.storage == "stack_oi" else f"{i}, {o}"
            lines.append(f"self.{n} = nn.Parameter(torch.empty(E, {shape}))")
        lines += [f"self.{n}_bias = nn.Parameter(torch.empty(E, {o}))"] if s.biases else []
    return lines


def call(s: Spec, e: str, rows: str) -> str:
    """Expert e of these rows, in a loop."""
    at = turned(s, e, "all")
    if s.storage == "list":
        return f"self.experts[{at}]({rows})"
    if s.storage == "dict":
        return f'self.experts[f"expert_{{{at}}}"]({rows})'
    return f"self.expert({e}, {rows})"


def methods(s: Spec, how: str) -> list[str]:
    """`expert(e, x)` for loops over parameters, `some(e, x)` for gathered weights, `every(x)` for dense code."""
    if how == "loop":
        return [] if s.storage in LISTS else _method(s, "expert(self, e, x)", "e", _one)
    if how == "gather":
        return _method(s, "some(self, e, x)", None, _gathered)
    return _method(s, "every(self, x)", None, _dense)


def _method(s: Spec, signature: str, e: str | None, linear) -> list[str]:  # type: ignore[no-untyped-def]
    gate = [f"g = {linear(s, 'gated', 'x')}"] if s.body == "glu_split" else []
    body = [f"h = {linear(s, 'up', 'x')}", *gate, *between(s, e), f"y = {linear(s, 'down', 'h')}", *leaving(s, e), "return y"]
    return [f"def {signature}:", *indented(body), ""]


def _detached(s: Spec, name: str) -> str:
    return ".detach()" if s.mistake == "weight_detached" and name == "up" else ""


def _one(s: Spec, name: str, rows: str) -> str:
    at = turned(s, "e", name)
    weight = f"self.{name}[{at}]{_detached(s, name)}"
    if s.storage == "stack_io":
        return f"{rows} @ {weight}" + (f" + self.{name}_bias[e]" if s.biases else "")
    return f"F.linear({rows}, {weight}{f', self.{name}_bias[e]' if s.biases else ''})"


def _table(s: Spec, name: str, kind: str = "weight") -> str:
    """All of them as one tensor [E, ...]."""
    if s.storage in LISTS:
        each = "self.experts" if s.storage == "list" else "self.experts.values()"
        return f"torch.stack([m.{name}.{kind} for m in {each}])"
    if kind == "bias":
        return f"self.{name}_bias"
    return (f"torch.stack(list(self.{name}))" if s.storage == "params" else f"self.{name}") + _detached(s, name)


def _gathered(s: Spec, name: str, rows: str) -> str:
    """e [N], rows [N, in]."""
    table, at = _table(s, name), turned(s, "e", name)
    if s.spelling == "gather_bmm":
        product = f"torch.bmm({rows}.unsqueeze(1), {table}[{at}]{'' if s.storage == 'stack_io' else '.transpose(1, 2)'}).squeeze(1)"
    else:
        product = f'torch.einsum("ni,{"nio" if s.storage == "stack_io" else "noi"}->no", {rows}, {table}[{at}])'
    return product + (f" + {_table(s, name, 'bias')}[e]" if s.biases else "")


def _dense(s: Spec, name: str, rows: str) -> str:
    """rows [T, in], or [T, E, in] from the second product on; gives [T, E, out]."""
    table = _table(s, name) + (".roll(1, 0)" if s.mistake == "expert_rotated" or (s.mistake == "down_rotated" and name == "down") else "")
    weight = "eio" if s.storage == "stack_io" else "eoi"
    return f'torch.einsum("{"ti" if rows == "x" else "tei"},{weight}->teo", {rows}, {table})' + (
        f" + {_table(s, name, 'bias')}" if s.biases else ""
    )
