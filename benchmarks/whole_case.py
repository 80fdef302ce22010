"""Models of transformers with real layer sizes and random weights, and what one call of them gets: a decode step or a prefill."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ROOM = 128  # tokens that a static cache has beyond its context
SETS = 3  # of tokens that take turns, more where a batch has few rows
ROWS = 16  # that are compared at the least
REAL: dict[str, dict[str, Any]] = {
    "qwen3": dict(
        architecture="qwen3_moe", hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
    ),
    "mixtral": dict(architecture="mixtral"),
    "gptoss": dict(architecture="gpt_oss"),
}  # fmt: skip
NAMES = {"qwen3": "Qwen3-30B-A3B", "mixtral": "Mixtral-8x7B", "gptoss": "GPT-OSS-120B"}
TINY = dict(  # with weights large enough that experts count
    hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_local_experts=8, num_experts_per_tok=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=128, sliding_window=8, initializer_range=0.125,
)  # fmt: skip


class Work(NamedTuple):
    """A call: sequences, tokens of each, and tokens before them in the cache (decode: one token behind a context)."""

    kind: str
    batch: int
    length: int
    context: int

    @property
    def label(self) -> str:
        return f"{self.kind} {self.batch} x {self.length}" + (f" behind {self.context}" if self.context else "")


# ---------------------------------------------------------------- the model
def build(name: str, layers: int, tiny: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model in eval; its weights are drawn as transformers initialises them, and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**REAL[name], **(TINY if tiny else {})}
    config = AutoConfig.for_model(sizes.pop("architecture"), num_hidden_layers=layers, **_known(name, sizes))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "bias" in key or "sinks" in key:
                p.normal_(std=0.02)
    return model.requires_grad_(False)


def _known(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes that this model's configuration has; a window only where the model uses one."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(REAL[name]["architecture"])
    return {key: value for key, value in sizes.items() if hasattr(config, key) and (key != "sliding_window" or _windowed(config))}


def _windowed(config: Any) -> bool:
    return "sliding_attention" in (getattr(config, "layer_types", None) or [])


def like(model: Any, experts: str | None = None) -> Any:
    """The model again, with the same weights and maybe another implementation of its experts."""
    memo = {id(each): each for each in itertools.chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, memo)
    if experts is not None:
        other.set_experts_implementation(experts)
    return other


class Skipped(torch.nn.Module):
    """In the place of experts: what the model takes without them."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


def experts_of(model: Any) -> list[tuple[Any, str]]:
    """(parent, name) of every module that computes experts."""
    return [(module, name) for module in model.modules() for name, _ in module.named_children() if name == "experts"]


def without_experts(model: Any) -> Any:
    other = like(model)
    for parent, name in experts_of(other):
        setattr(parent, name, Skipped())
    return other


def slot_bytes(model: Any) -> int:
    """Bytes of the weights of one slot (one expert for one token) in one layer."""
    (parent, name) = experts_of(model)[0]
    experts = getattr(parent, name)
    return sum(p.numel() * p.element_size() for p in experts.parameters()) // model.config.num_local_experts


# ---------------------------------------------------------------- a call
class Step:
    """Static inputs of a work for one model: tokens, their positions, and a cache whose contents are put back before each call."""

    def __init__(self, model: Any, work: Work, sets: list[Any], saved: list[tuple[Any, Any]]) -> None:
        self.work, self.sets, self.saved = work, sets, saved
        device = sets[0].device
        self.ids = sets[0].clone()
        self.cache = _cache(model, work) if work.context else None
        self.positions = None  # the model's own
        if work.context:
            self.positions = torch.arange(work.context, work.context + work.length, device=device).unsqueeze(0)

    @classmethod
    def drawn(cls, model: Any, work: Work) -> Step:
        """With random tokens, and random keys and values of the context."""
        device = model.device
        generator = torch.Generator(device).manual_seed(work.batch * work.length)
        size = (work.batch, work.length)
        number = max(SETS, -(-ROWS // work.batch))
        sets = [torch.randint(0, model.config.vocab_size, size, generator=generator, device=device) for _ in range(number)]
        if not work.context:
            return cls(model, work, sets, [])
        like_these = [(layer.keys, layer.values) for layer in _cache(model, work).layers]
        saved = [tuple(torch.randn(t.shape, generator=generator, device=device).to(t.dtype) for t in pair) for pair in like_these]
        return cls(model, work, sets, saved)  # type: ignore[arg-type]

    def of(self, model: Any) -> Step:
        """The same for a model of another dtype."""
        dtype = next(model.parameters()).dtype
        return Step(model, self.work, self.sets, [(k.to(dtype), v.to(dtype)) for k, v in self.saved])

    def load(self, at: int) -> None:
        self.ids.copy_(self.sets[at % len(self.sets)])
        if self.cache is None:
            return
        for layer, (keys, values) in zip(self.cache.layers, self.saved):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            layer.cumulative_length.fill_(self.work.context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.work.context


def _cache(model: Any, work: Work) -> Any:
    """transformers' static cache, allocated outside of what is compiled."""
    from transformers import StaticCache

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=work.context + ROOM)
    dtype = next(model.parameters()).dtype
    cache.early_initialization(work.batch, config.num_key_value_heads, head_dim, dtype, model.device)
    return cache


_numbers = itertools.count()


def step_of(model: Any) -> Callable[..., Any]:
    """step(ids, positions, cache) -> logits of each sequence's last token. A code object of its own: Dynamo looks nowhere else."""

    def step(ids: Any, positions: Any, cache: Any) -> Any:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits

    step.__code__ = step.__code__.replace(co_name=f"step_{next(_numbers)}")
    return step


# ---------------------------------------------------------------- what is right
def widened(model: Any) -> Any:
    """The model in float32, its experts one after the other."""
    wide = copy.deepcopy(model).float()
    wide.set_experts_implementation("eager")
    return wide


def wanted(wide: Any, step: Step) -> list[Any]:
    """Logits [batch, vocabulary] of each set."""
    call, own = step_of(wide), step.of(wide)
    found = []
    for at in range(len(step.sets)):
        own.load(at)
        batches = [own.ids] if own.cache is not None else own.ids.split(1)  # one long sequence after the other: memory
        with torch.no_grad():
            found.append(torch.cat([call(ids, own.positions, own.cache)[:, -1] for ids in batches]))
    return found


def row_errors(got: Any, want: Any) -> Any:
    """Relative errors (2-norm) of rows; infinity for NaN."""
    off = (got.float() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
    return torch.nan_to_num(off, nan=float("inf"))
