"""Provider "local" of the comm stage: all experts are on this rank. Its dispatch and its combine belong together."""

from __future__ import annotations

from .. import combine, quantize_dispatch, registry


def supports(problem: registry.Problem) -> str | None:
    if problem.world > 1:
        return f"local keeps all experts on one rank, world is {problem.world}"
    return None if problem.quant == "none" else f"local does not quantise rows, quant is {problem.quant!r}"


def cost(problem: registry.Problem) -> float:
    """Microseconds: a sort of N small integers and one pass over y."""
    slots = (problem.tokens or 1024) * problem.top_k
    return 20.0 + slots * (0.01 + 1e-4 * problem.hidden)


PROVIDER = registry.register(
    registry.Provider(
        "local",
        "comm",
        {quantize_dispatch.NAME: quantize_dispatch.local, combine.NAME: combine.local},
        cost,
        supports,
    )
)
