"""What the kernels of a layer are launched with, and what that is chosen by: numbers alone, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def power(size: int, least: int = 1) -> int:
    """The least power of two that is not below size, nor below `least`, one itself."""
    return max(least, 1 << max(0, size - 1).bit_length())


@dataclass(frozen=True)
class Tiles:
    """One GEMM's launch. rows, cols, depth: of a tile (cols of each product). group: blocks that share a weight tile in L2.

    swap: weights are the tensor core's M side. persistent: a program for each multiprocessor. half: the result is stored in two boxes.
    spread: rows are copied into sorted order before, so that a descriptor can read them. described: weights are read by descriptors where
    they can be. early: the kernel is launched while the one before it runs (programmatic dependent launch). skip: padding of
    gathered rows is not read.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    swap: bool = False
    persistent: bool = False
    half: bool = False
    spread: bool = False
    described: bool = True
    early: bool = False
    skip: bool = False


@dataclass(frozen=True)
class Shape:
    """What tiles are chosen by: slots N, experts E, inner width, columns of each product, products at a time, bytes of an element.

    layout: how the weights lie, "oi" or "io", with "*" behind it for one tensor an expert, or ":" and the kind of quantised ones (and
    what else their tiles depend on, configs_scaled.py); "" is not known. device: the torch.device that computes; None is the current one.
    """

    slots: int
    experts: int
    inner: int
    width: int
    products: int
    itemsize: int
    layout: str = ""
    device: Any = None


@dataclass(frozen=True)
class Strip:
    """One layer for single slots: columns and depth of what a program holds."""

    cols: int
    depth: int
    warps: int
