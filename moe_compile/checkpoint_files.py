"""What a checkpoint of a sharded model consists of: the tensors of the model, and the pieces of them in safetensors files."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_compile.ops.expert_shard import SHARDS
from moe_compile.sharding import Shard, expert_owner, expert_range, shards

INDEX = "moe_compile.index.json"
REST = "rest.safetensors"


class Piece(NamedTuple):
    """Rows [first, last) of a tensor in a file; last is None for all of it."""

    file: Path
    first: int
    last: int | None


@dataclasses.dataclass
class Slot:
    """One parameter or persistent buffer of a model: its tensor, its names, the places that hold it, its shard."""

    tensor: Any
    names: list[str]
    places: list[tuple[dict[str, Any], str]]
    shard: Shard | None

    @property
    def rows(self) -> tuple[int, int] | None:
        """The rows of the whole that are held, None for all."""
        if self.shard is None or self.shard.kind != "stacked":
            return None
        count = (self.tensor.to_local() if self.shard.dtensor else self.tensor).shape[0]
        return self.shard.first, self.shard.first + count


def slots(model: nn.Module) -> list[Slot]:
    """Each tensor of the state dict once, tied names together."""
    found: dict[int, Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        persistent = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for holder, named in ((module._parameters, module._parameters), (module._buffers, persistent)):
            for name, tensor in named.items():
                if tensor is None:
                    continue
                slot = found.setdefault(id(tensor), Slot(tensor, [], [], vars(module).get(SHARDS, {}).get(name)))
                slot.names.append(f"{path}.{name}" if path else name)
                slot.places.append((holder, name))
    return list(found.values())


def safetensors(module: str = "safetensors") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"checkpoints need the package safetensors ({error}); install it: pip install safetensors") from error


def opened(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is named by the checkpoint's index, but does not exist; copy it there, or save again")
    return safetensors().safe_open(str(path), framework="pt", device="cpu")


def catalog(paths: list[Any]) -> dict[str, list[Piece]]:
    """name -> the pieces that it consists of, sorted by rows."""
    found: dict[str, list[Piece]] = {}
    for file in (file for path in paths for file in _files(Path(path))):
        for name, piece in _index(file) if file.suffix == ".json" else _contents(file):
            found.setdefault(name, []).append(piece)
    return {name: sorted(set(pieces), key=lambda piece: piece.first) for name, pieces in found.items()}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    own, indices = path / INDEX, sorted(path.glob("*.safetensors.index.json"))
    files = [own] if own.exists() else indices[:1] or sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no *.safetensors and no index of them; give the folder or the files of a checkpoint")
    return files


def _index(path: Path) -> Iterator[tuple[str, Piece]]:
    index = json.loads(path.read_text())
    for name, file in index["weight_map"].items():
        yield name, Piece(path.parent / file, 0, None)
    for name, parts in index.get("experts", {}).items():
        yield from ((name, Piece(path.parent / file, first, last)) for file, first, last in parts)


def _contents(path: Path) -> Iterator[tuple[str, Piece]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a .safetensors file, an index (.json) or a folder with them")
    with opened(path) as file:
        ranges = json.loads((file.metadata() or {}).get("moe_compile", "{}"))
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, Piece(path, *ranges.get(name, (0, None)))


def read(slot: Slot, name: str, pieces: list[Piece], file_of: Callable[[Path], Any]) -> Any:
    """The rows of the slot. Each piece gives what overlaps; safetensors reads those bytes only."""
    sources = [(piece, file_of(piece.file).get_slice(name)) for piece in pieces]
    ends = [piece.first + source.get_shape()[0] if source.get_shape() else 1 for piece, source in sources]
    wanted = tuple(slot.shard.shape if slot.shard else slot.tensor.shape)
    given = (ends[-1], *sources[0][1].get_shape()[1:]) if wanted else tuple(sources[0][1].get_shape())
    if given != wanted or [piece.first for piece, _ in sources] != [0, *ends[:-1]]:
        spans = ", ".join(f"{piece.file.name}: rows {piece.first} to {end - 1}" for (piece, _), end in zip(sources, ends))
        raise ValueError(
            f"{name} is {list(wanted)} in the model and {list(given)} in the checkpoint ({spans}); load the same model's checkpoint"
        )
    first, last = slot.rows or (0, ends[-1])
    if not wanted:
        return sources[0][1][...]
    cuts = [(source, max(first - p.first, 0), min(last, end) - p.first) for (p, source), end in zip(sources, ends)]
    parts = [source[start:stop] for source, start, stop in cuts if start < stop]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else sources[0][1][0:0]


def expert_file(rank: int, ep: int) -> str:
    """The file of a rank's experts."""
    return f"experts-{rank + 1:05d}-of-{ep:05d}.safetensors"


def expert_places(model: nn.Module, ep: int) -> dict[str, list[tuple[str, int, int | None]]]:
    """name -> (file, first, last) of each part; last is None for a parameter of one expert."""
    found: dict[str, list[tuple[str, int, int | None]]] = {}
    first_names = {id(slot.tensor): slot.names[0] for slot in slots(model)}
    for path, module, name, shard in shards(model):
        full = (f"{path}.{name}" if path else name) if shard.kind == "absent" else first_names[id(module._parameters[name])]
        if shard.kind == "stacked":
            found[full] = [(expert_file(r, ep), *expert_range(shard.num_experts, ep, r)) for r in range(ep)]
        else:
            found[full] = [(expert_file(expert_owner(shard.first, shard.num_experts, ep), ep), 0, None)]
    return found
