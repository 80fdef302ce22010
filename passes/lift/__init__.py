"""What does the graph compute?  Read-only analysis: functional ATen graph -> `Formula`.

sizes.py    extents, perhaps symbolic        interp.py   node by node: rules, leaves, routing decisions
expr.py     interned expressions             rules/      one rule per ATen op, a file per family
index.py    index arithmetic                 merge.py    E unrolled experts -> one expression of the id
algebra.py  sums, products, selections       normal.py   sum over experts -> selection by id
ranks.py    capacity: positions within experts' buffers
value.py    tensors: dims + element          program.py, read.py   normal form -> Formula
"""

from .expr import Refused, fresh_table
from .interp import Interp, decision, opname
from .read import Formula, read

__all__ = ["Formula", "Interp", "Refused", "decision", "fresh_table", "opname", "read"]
