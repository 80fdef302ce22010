"""The body of a loop over tokens, written down for one token, as torch calls on all of them: by torch.vmap, traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.overrides import _pop_mode_temporarily

from moe_compile.probing.calls import writes
from moe_compile.probing.emptiness import name_of
from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.tokens import Loop

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def batch(r: Recorder, loop: Loop) -> None:
    """Put calls on all tokens in the place of the loop's body."""
    body = _Body(r, loop)
    if not body.rows:
        return
    operands = body.operands()
    traced = body.traced(operands)
    traced.graph.eliminate_dead_code()
    new = _spliced(r, traced, [n.args[0] if n in body.rows else n for n in operands])  # type: ignore[misc]
    results = dict(zip(body.results, new))
    body.forget()
    for x, _, n in loop.rows.values():
        if id(x) in body.written:
            _put_back(r, x, results[n])
    for n in body.results:
        value = body.values[n]
        r.tape.gone[id(value)] = results[n]


class _Body:
    """nodes: those that depend on the token; what else was written down in the loop stays where it stands."""

    def __init__(self, r: Recorder, loop: Loop) -> None:
        self.r, self.loop = r, loop
        self.place = where(users_frame())
        written_down = after(loop.start)
        self.rows = [n for _, _, n in loop.rows.values()]
        self.nodes = dependent(written_down, self.rows)
        self.mine = set(self.nodes)
        self.values = {n: r.tape.value[n] for n in self.nodes if isinstance(r.tape.value.get(n), torch.Tensor)}
        self.results = list(self.values)
        self.written = {key for key, (x, _, _) in loop.rows.items() if x._version != loop.versions[key]}
        self._refuse(written_down)

    def _refuse(self, written_down: list[Node]) -> None:
        for n in written_down:
            if name_of(n) in ("opened", "closed"):
                raise NotProbed(f"{self.place}: autocast or a gradient mode within a loop over tokens")
            if writes(name_of(n)) and not {n, n.args[0]} <= self.mine:
                raise NotProbed(f"{self.place}: a loop over tokens writes to a tensor of all tokens ({name_of(n)})")
        memory = [_memory(x) for key, (x, _, _) in self.loop.rows.items() if key in self.written]
        read = {*self._shared(), *[a for n in written_down if n not in self.mine and not self._view(n) for a in n.all_input_nodes]}
        if len(set(memory)) < len(memory) or any(self._memory(n) in memory for n in read):
            raise NotProbed(f"{self.place}: what a loop over tokens writes is read by other names within it")

    def _view(self, n: Node) -> bool:
        return self._memory(n) is not None and self._memory(n) in map(self._memory, n.all_input_nodes)

    def _memory(self, n: Node) -> int | None:
        t = self.r.tape.value.get(n)
        return _memory(t) if isinstance(t, torch.Tensor) else None

    def _shared(self) -> dict[Node, torch.Tensor]:
        """Tensors that all tokens read."""
        read = {a for n in self.nodes for a in n.all_input_nodes if a not in self.mine and n not in self.rows}
        return {n: t for n in read if isinstance(t := self.r.tape.value.get(n), torch.Tensor)}

    # ------------------------------------------------------------ as a function of tensors
    def operands(self) -> dict[Node, torch.Tensor]:
        """Tensors from outside of the body: those with a row for each token first, then what all tokens share."""
        whole = {n: x for x, _, n in self.loop.rows.values()}
        found = {**{n: whole[n] for n in self.rows}, **self._shared()}
        for n in self.nodes:
            if n.op == "call_module":
                found.update(self._parameters(str(n.target)))
        return found

    def _parameters(self, path: str) -> dict[Node, torch.Tensor]:
        """Of a submodule that the body calls."""
        m = self.r.root.get_submodule(path)
        return {self.r.tape.node(t): t for t in [*m.parameters(), *m.buffers()]}

    def traced(self, operands: dict[Node, torch.Tensor]) -> GraphModule:
        """ATen calls on all tokens that give all results."""
        nodes, tensors = list(operands), list(operands.values())
        dims = tuple(0 if n in self.rows else None for n in nodes)
        every = torch.vmap(lambda *args: self._run(dict(zip(nodes, args))), in_dims=dims)

        def call(*args: torch.Tensor) -> Any:
            return torch.func.functionalize(every)(*args)

        self.r.numbers.pending_fresh_unbacked_symbols.clear()  # of numbers that were asked for so far: none of these calls gives them
        known = len(self.r.numbers.guards)
        try:
            with self.r.off(), _pop_mode_temporarily(), torch.no_grad(), enable_python_dispatcher():
                traced = make_fx(call)(*[t.detach() for t in tensors])
        except NotProbed:
            raise
        except Exception as e:
            raise NotProbed(
                f"{self.place}: the loop over tokens is none that torch.vmap can run: {(str(e).splitlines() or [''])[0][:160]}"
            ) from e

        if any(isinstance(g.expr, sympy.Eq) for g in self.r.numbers.guards[known:]):
            raise NotProbed(f"{self.place}: torch.vmap runs the loop over tokens for this number of tokens alone")
        return traced

    def _run(self, given: dict[Node, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The body on one token."""
        keys = {n: key for key, (_, _, n) in self.loop.rows.items()}
        env = {n: t.clone() if keys.get(n) in self.written else t for n, t in given.items()}
        anchor = next(env[n] for n in self.rows)
        for n in self.nodes:
            if n not in given:
                env[n] = self._step(n, env, given, anchor)
        return tuple(env[n] for n in self.results)

    def _step(self, n: Node, env: dict[Node, Any], given: dict[Node, torch.Tensor], anchor: torch.Tensor) -> Any:
        def value(a: Node) -> Any:
            return env[a] if a in env else self._number(a)

        args, kwargs = map_arg(n.args, value), map_arg(n.kwargs, value)
        if n.op == "call_module":
            m = self.r.root.get_submodule(str(n.target))
            mine = {name: given[self.r.tape.node(t)] for name, t in [*m.named_parameters(), *m.named_buffers()]}
            return torch.func.functional_call(m, mine, args, kwargs)
        name = name_of(n)
        if name == "item":
            return args[0]
        out = getattr(args[0], str(n.target))(*args[1:], **kwargs) if n.op == "call_method" else n.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(out, torch.Tensor) and not self.mine.intersection(n.all_input_nodes):
            zero = name in ("zeros", "zeros_like", "new_zeros")  # made here to be written to
            return anchor.new_zeros(out.shape, dtype=out.dtype) if zero else anchor.new_empty(out.shape, dtype=out.dtype).copy_(out)
        return out

    def _number(self, n: Node) -> Any:
        if n not in self.r.tape.numbers:
            raise NotProbed(f"{self.place}: {name_of(n)} in a loop over tokens")
        return self.r.tape.numbers[n]

    def forget(self) -> None:
        self.r.tape.forget(self.nodes)


def after(start: Node | None) -> list[Node]:
    nodes, n = [], start.next if start is not None else None
    while n is not None and n.op != "root":
        nodes.append(n)
        n = n.next
    return nodes


def dependent(written_down: list[Node], rows: list[Node]) -> list[Node]:
    """Rows, what is computed of them, and what that is written into."""
    mine = set(rows)
    known = set(written_down)
    before = -1
    while len(mine) != before:
        before = len(mine)
        for n in written_down:
            if any(a in mine for a in n.all_input_nodes):
                mine.add(n)
                if writes(name_of(n)) and isinstance(n.args[0], Node) and n.args[0] in known:
                    mine.add(n.args[0])
    return [n for n in written_down if n in mine]


def _memory(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


# ---------------------------------------------------------------- onto the tape
def _spliced(r: Recorder, gm: GraphModule, operands: list[Node]) -> list[Node]:
    """Write the traced calls down; the nodes of the results."""
    table: dict[Node, Any] = {}
    inputs = iter(operands)
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        if n.op == "placeholder":
            table[n] = next(inputs)
        elif n.op == "output":
            return [table[a] for a in n.args[0]]
        elif n.op == "get_attr":
            raise NotProbed("a loop over tokens makes a tensor of numbers")
        elif isinstance(value, torch.SymInt | torch.SymFloat):
            table[n] = r.tape.number(value)
        elif isinstance(value, int | float):
            table[n] = value
        elif n.target is torch.ops.aten.copy.default:
            table[n] = _copied(r, n, table)
        else:
            args, kwargs = (map_arg(x, lambda a: table[a]) for x in (n.args, n.kwargs))
            table[n] = r.tape.add("call_function", n.target, args, kwargs)
            r.tape.hold(table[n], value)
    raise AssertionError("a traced graph has an output")


def _copied(r: Recorder, n: Node, table: dict[Node, Any]) -> Node:
    """What copy_ writes, as a tensor: the source, of the target's shape and dtype. ATen's own has no gradient."""
    target, source, value = n.args[0].meta["val"], n.args[1].meta["val"], n.meta["val"]  # type: ignore[union-attr]
    found: Node = table[n.args[1]]  # type: ignore[index]
    with r.off():
        if source.dtype != target.dtype:
            found, source = r.tape.add("call_method", "to", (found, target.dtype)), source.to(target.dtype)
            r.tape.hold(found, source)
        if tuple(source.shape) != tuple(value.shape):
            found = r.tape.add("call_method", "expand", (found, r.tape.written(tuple(value.shape))))
            r.tape.hold(found, value)
    return found


def _put_back(r: Recorder, x: torch.Tensor, new: Node) -> None:
    """x holds what node `new` gives."""
    r.constants.forget(x)
    if r.tape.alone(x):
        r.tape.renamed(x, new)
    else:
        r.tape.add("call_method", "copy_", (r.tape.node(x), new))
