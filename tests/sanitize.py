"""The kernels' small test cases under NVIDIA's compute-sanitizer: python tests/sanitize.py [--tools memcheck racecheck] [--jobs 8]

Every case runs once without a tool, which also fills Triton's cache, then under each tool, in several processes. The exit code is 1 if a
case fails or a tool reports anything; its reports are printed. --list prints the cases and needs no GPU. docs/kernels.md has more.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import glob
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "synccheck")
MARK = "========= "
REPORTS = 12  # lines of each report that are printed
# Forward, backward, plan, quantised weights, one token, batched rows: each form of kernel, not each program.
CHOSEN = {
    "test_experts_triton": (
        "programs-halves-*", "programs-biased-eoi", "programs-apart-oi*", "programs-deep-eio", "blocks-*-halves", "blocks-*-one",
        "odd_sizes-*", "half_precision-bfloat16-*", "half_precision-float16-halves", "many_tiles", "rows_that_were_spread",
        "one_token-halves-*", "one_token-biased-eio", "one_token-apart-oi*", "gradients-halves-*", "gradients-both biases-eio",
        "gradients-apart-*", "gradients_of_odd_sizes-*-random", "gradients_in_other_dtypes", "many_rows-*",
    ),
    "test_plan_kernels": (
        "kinds-*-7", "many_experts-*-1024", "sizes-*-(129, 1)", "sizes-*-(0, 3)", "wide_ids-*", "strided-*", "from_order-50-*",
        "from_counts-37-*",
    ),
    "test_scaled_kernels": (
        "programs-halves-*", "programs-biased-mxfp4", "odd_sizes-*", "blocks-fp8_*", "blocks-mxfp4", "one_scale_an_output-int4-*",
        "rows_that_were_sent-*", "one_token-*-oi-128",
    ),
    "test_batched_experts": (
        "programs-halves-*", "counts_and_capacities-*", "half_precision-*", "persistent_tiles", "rows_that_came_in_e4m3-*",
        "quantised_weights-*", "through_the_op-fp8-fp8_block-*",
    ),
}  # fmt: skip


# ---------------------------------------------------------------- cases
@functools.cache
def functions(module: str) -> dict[str, Callable[[], Any]]:
    """A test file's cases, which run on the GPU where there is one; and its cases of many rows."""
    test: Any = importlib.import_module(module)
    many = {f"many_rows-{sizes}": functools.partial(test.test_many_rows_on_a_gpu, "halves", "eoi", sizes) for sizes in _large(test)}
    return {**test.CASES.functions, **many}


def _large(test: Any) -> tuple[Any, ...]:
    return getattr(test, "LARGE", ())


def chosen(patterns: list[str] | None) -> list[str]:
    """file:case, of the patterns given or of CHOSEN. Exits where a pattern has no case."""
    wanted = [(module, each) for module, patterns in CHOSEN.items() for each in patterns]
    if patterns is not None:
        wanted = [tuple(each.split(":", 1)) for each in patterns if ":" in each]  # type: ignore[misc]
        if len(wanted) < len(patterns):
            raise SystemExit(f"--cases takes FILE:PATTERN, for example {next(iter(CHOSEN))}:programs-*; given {' '.join(patterns)}")
    found: dict[str, None] = {}
    for module, pattern in wanted:
        own = [name for name in functions(module) if fnmatch.fnmatchcase(name, pattern)]
        if not own:
            raise SystemExit(f"no case of {module} is named {pattern}; --list prints names")
        found.update(dict.fromkeys(f"{module}:{name}" for name in own))
    return list(found)


def run(names: list[str]) -> None:
    for name in names:
        module, case = name.split(":", 1)
        print(f"case {name}", flush=True)
        functions(module)[case]()


# ---------------------------------------------------------------- the tool
def sanitizer() -> str:
    """Its path. Exits and says where it was looked for."""
    beside = [Path(path).parent for path in (shutil.which("nvcc"),) if path]
    homes = [Path(path) / "bin" for path in (os.environ.get("CUDA_HOME"), *sorted(glob.glob("/usr/local/cuda*"), reverse=True)) if path]
    for folder in (*beside, *homes):
        for path in (folder / "compute-sanitizer", folder.parent / "compute-sanitizer" / "compute-sanitizer"):
            if os.access(path, os.X_OK) and path.is_file():
                return str(path)
    found = shutil.which("compute-sanitizer")
    if found is None:
        looked = ", ".join(map(str, ("PATH", *beside, *homes)))
        raise SystemExit(f"compute-sanitizer is not in {looked}; it comes with the CUDA toolkit: set CUDA_HOME to where that is")
    return found


def under(tool: str | None, names: list[str], path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--run", *names]
    env = dict(os.environ)
    if tool is not None:
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]  # torch asks for what may not be
        command = [path, *options, *(["--padding", "512"] if tool == "memcheck" else []), *command]
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that each tensor is an allocation with bounds of its own
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def told(output: str) -> list[str]:
    """What a tool said of errors, with the case before each; for a failed case the end of its traceback."""
    lines = output.splitlines()
    found, case, left = [], "", 0
    for line in lines:
        if line.startswith("case "):
            case, left = line, 0
        elif line.startswith(MARK) and not line.startswith((MARK + " ", MARK + "COMPUTE-SANITIZER")):
            found.append(line if "SUMMARY" in line else f"{case}: {line}")
            left = REPORTS
        elif left and line.startswith(MARK):
            found.append(line)
            left -= 1
    return found if len(found) > 1 else [case, *found, *lines[-REPORTS:]]


def check(tool: str | None, names: list[str], jobs: int, path: str) -> bool:
    """Whether all cases are clean under a tool."""
    slices = [names[at::jobs] for at in range(min(jobs, len(names)))]
    with ThreadPoolExecutor(len(slices)) as pool:
        done = list(pool.map(lambda own: under(tool, own, path), slices))
    bad = [each for each in done if each.returncode]
    print(f"{tool or 'without a tool'}: {len(names)} cases in {len(slices)} processes, {len(bad)} of them not clean", flush=True)
    for each in bad:
        print("\n".join(told(each.stdout)), flush=True)
    return not bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"], choices=TOOLS)
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--cases", nargs="+", metavar="FILE:PATTERN", help="others than the chosen ones, for example test_plan_kernels:*")
    parser.add_argument("--list", action="store_true", help="prints the cases")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run)
        return
    names = chosen(args.cases)
    if args.list:
        print("\n".join(names))
        return
    path = sanitizer()
    print(path, flush=True)
    if not check(None, names, args.jobs, path):
        raise SystemExit("cases fail without a tool")
    clean = [check(tool, names, args.jobs, path) for tool in args.tools]
    if not all(clean):
        raise SystemExit("not clean")


if __name__ == "__main__":
    main()
