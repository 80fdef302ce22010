"""Module classes that Dynamo cannot capture, as straight-line programs that it can.

scout.py       one call of a copy of the model: which modules decide in Python on what tensors hold
trial.py       whether Dynamo captures such a module alone
numbers.py     sizes and numbers as symbols; what Python asks of those that only the data tells
record.py      the module's forward on fake tensors, each torch call written down, each such question answered once
  shadow.py      the module and its arguments on fake tensors; recording.py  what is kept
  recorder.py    every torch call and submodule; regions.py  autocast, gradients on or off
  fakes.py       fake results by a shorter way; calls.py  what a call writes into, by its name
  tape.py        the graph being written: nodes of tensors, symbols as nodes by formulas.py
  constants.py   what follows from constants; ranges.py  ids below which number
  contents.py    what Python asks of contents; hit.py  loops over the experts that are hit; counting.py  bincount, histc
  drawn.py       dropout within the experts
  indices.py     indices in forms that are easier to follow
  tokens.py      loops over tokens: their body runs once; batched.py  as calls on all tokens; chosen.py  experts[i] in it
  lists.py       such loops that put tokens into lists; paths.py  their body once for each answer; bodies.py  what must not be in it
emptiness.py   the questions of tensors that have an answer: "is it empty?"
reads.py       what else the code has seen: attributes, functions, constants of its file
state.py       what it must not leave behind; outside.py  in globals, outer variables and classes
errors.py      why a module is left as it is, and whose code asks
program.py     what was written down, as a Python function of (module, arguments), and one that says when it holds
whole.py       that function as one call in a graph, for blocks that come again and again
check.py       that function against the module, on routings with experts hit and not hit
steer.py       such routings
probe.py       all of this for the calls that scout.py has found
install.py     the class' forward calls it while moe_compile's Dynamo captures, and only then
"""

from moe_compile.probing.install import restore
from moe_compile.probing.probe import mode_of, probe_first_call, probe_model

__all__ = ["mode_of", "probe_first_call", "probe_model", "restore"]
