"""Which scores choose the experts, and how are their weights made?  Read-only analysis behind a rewritten MoE block.

window.py   the Dynamo nodes from the logits to the dispatch, traced to functional ATen
nodes.py    what is asked of ATen nodes
groups.py   a choice that is limited to the best groups of experts
read.py     ATen -> Router
text.py     Router -> "w = renorm(topk_2(softmax(logits)))"
plan.py     Router -> which nodes of the graph give way to `route`
"""

from .plan import Plan
from .read import Router, read_router
from .text import describe, spelled_out
from .window import Traced, Window, trace_window, window_before

__all__ = ["Plan", "Router", "Traced", "Window", "describe", "read_router", "spelled_out", "trace_window", "window_before"]
