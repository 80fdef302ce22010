"""The compiler's passes over one Dynamo graph, in order.

repeated.py    a choice that the code makes again is the first one   (undone where nothing is rewritten)
decisions.py   where does the graph choose experts?                   (read-only)
window.py      trace what follows to functional ATen                  (read-only)
lift/          what does it compute?  ATen -> Formula                 (read-only)
region.py      which nodes are the block, and which fall with it      (read-only)
select.py      which provider computes each stage                     (policy)
emit.py, rewrite.py    Formula -> stage ops, spliced into the graph   (no decisions)
standalone.py, validate.py   original against replacement, executed   (keeps or drops a rewrite)
router/, routing.py    which router stands before a block?  -> route   (where that saves nodes)
fuse.py        two stages in one op, for Inductor
diff.py        normal form of a graph, for reports and tests
run.py         drives them
"""

from .run import run

__all__ = ["run"]
