"""Which scores choose the experts, and how are their weights made?  Read-only analysis behind a rewritten MoE block.

window.py   the Dynamo nodes from the logits to the dispatch, traced to functional ATen
nodes.py    what is asked of ATen nodes
groups.py   a choice that is limited to the best groups of experts
read.py     ATen -> Router
text.py     Router -> "w = renorm(topk_2(softmax(logits)))"
"""

from .read import Router, read_router
from .text import describe, input_name, spelled_out
from .window import Window, traced, window_before

__all__ = ["Router", "Window", "describe", "input_name", "read_router", "spelled_out", "traced", "window_before"]
