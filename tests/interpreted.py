"""Cases that run in Triton's interpreter on CPU tensors. Triton reads TRITON_INTERPRET when a kernel is defined, so a test file runs its
cases in one subprocess, `python test_x.py [case ...]`, and each is a test of its own:

    CASES = Cases(__file__)
    @CASES.add((2, "a"), (3, "b"))
    def something(n, name): ...
    test_in_interpreter = CASES.test()
    if __name__ == "__main__": CASES.main()
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest


class Cases:
    def __init__(self, file: str, timeout: float = 900) -> None:
        self.file, self.timeout = file, timeout
        self.functions: dict[str, Callable[[], None]] = {}

    def add(self, *arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
        """The decorated function is a case for each tuple of arguments, or one without."""

        def decorate(function: Any) -> Any:
            for args in arguments or ((),):
                name = "-".join([function.__name__, *(str(arg).replace("torch.", "") for arg in args)])
                self.functions[name] = functools.partial(function, *args)
            return function

        return decorate

    @functools.cached_property
    def results(self) -> dict[str, str]:
        """case -> "" or its traceback."""
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, self.file]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=self.timeout, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
        found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
        return found

    def test(self) -> Any:
        @pytest.mark.parametrize("name", self.functions)
        def test_in_interpreter(name: str) -> None:
            pytest.importorskip("triton")
            assert not self.results[name], self.results[name]

        return test_in_interpreter

    def main(self) -> None:
        found, names = {}, sys.argv[1:]
        whole_numbers_of_one_element()
        masks_of_truth_values()
        poison_new_memory()
        for name in names or self.functions:
            try:
                self.functions[name]()
                found[name] = ""
            except Exception:  # noqa: BLE001  the traceback is the result
                found[name] = traceback.format_exc()
                if names:
                    print(found[name])
        print(json.dumps(found))


def poison_new_memory() -> None:
    """New memory holds NaN, and the largest whole numbers, so that what is read without having been written shows."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def whole_numbers_of_one_element() -> None:
    """Triton 3.6 takes an array of one element for a whole number, say the end of a range; numpy 2.4 refuses, later Tritons squeeze it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def masks_of_truth_values() -> None:
    """Triton's interpreter makes a comparison of scalars a number when it is broadcast; from 3.9 on it refuses that as a mask."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(builder, name, _with_true_mask(getattr(builder, name), at))


def _with_true_mask(method: Any, at: int) -> Any:
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(args[at].data, "astype"):  # older Tritons hand over other things, and take any mask
            args[at].data = args[at].data.astype(bool)
        return method(self, *args, **kwargs)

    return checked
