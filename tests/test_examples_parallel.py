"""The examples of expert parallelism as a user starts them, and docs/parallel.md: its Python runs, its tables are those of the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compile.ops  # noqa: F401  (registers the providers)
from moe_compile import ParallelConfig
from moe_compile.ops.registry import Problem, providers

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parallel.md"
TEXT = PAGE.read_text()
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
EAGER = "import functools\nimport moe_compile\nmoe_compile.compile = functools.partial(moe_compile.compile, inner='eager')\n"
AFRESH = "\ntorch._dynamo.reset()\n"  # each block of the page compiles as if it were the first


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "ending"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def ends_well(out: str, ranks: int, threads: int = 0) -> None:
    """No process leaves threads that may want an interpreter which is gone: that is SIGABRT, and only now and then."""
    ends = re.findall(r"^rank (\d+) ends with (\d+) threads of gloo$", out, flags=re.MULTILINE)
    assert sorted(ends) == [(str(rank), str(threads)) for rank in range(ranks)], out


def launched(ranks: int, *command: Any, timeout: float = 400.0, threads: int = 0) -> str:
    """What a program over ranks printed; it must end well."""
    words = [*LAUNCH, str(ranks), *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    ends_well(done.stdout, ranks, threads)
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in\n{text}"
    return float(found[1])


# ---------------------------------------------------------------- examples
def claims_of_inference(out: str, comm: str) -> None:
    assert re.search(r"MoE blocks in \d graphs?: [24] rewritten, 0 left as they were", out), out
    assert re.search(rf"comm +{comm}\n", out), out
    assert "not local: local keeps all experts on one rank, world is 2" in out
    assert "not nvlink: nvlink runs on CUDA devices, device is 'cpu'" in out
    assert number(r"worst rank: (\S+) \(limit", out) < 1e-5
    before, after = (number(rf"([\d.]+) MB {when}", out) for when in ("before", "after"))
    assert after < 0.8 * before


def test_inference() -> None:
    out = launched(2, "examples/expert_parallel.py", "--inner", "eager", "--comm", "alltoall")
    claims_of_inference(out, "alltoall")
    assert "not allgather: ParallelConfig.comm asks for 'alltoall'" in out


@pytest.mark.slow
@pytest.mark.inductor
def test_inference_as_the_page_says() -> None:
    out = launched(2, "examples/expert_parallel.py")
    claims_of_inference(out, r"\w+")
    assert "experts 0..3 of 8 on this rank, 2 ranks" in out


def test_inference_with_tensor_parallel_tokens() -> None:
    out = launched(4, "examples/expert_parallel.py", "--inner", "eager", "--ep", "2", "--tp", "2")
    assert "ep 2, tp 2, dp 1 on 4 ranks; 2 of them have each expert" in out
    assert "tokens over 2 tensor-parallel ranks: slice" in out


def test_a_model_that_cannot_be_spread_fails_with_the_reason() -> None:
    command = [*LAUNCH, "2", "examples/expert_parallel.py", "--inner", "eager", "--comm", "nvlink"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode != 0
    assert "nvlink runs on CUDA devices, device is 'cpu'" in done.stderr


def claims_of_training(out: str, then: str) -> None:
    assert "saved: experts-00001-of-00002.safetensors, experts-00002-of-00002.safetensors, moe_compile.index.json" in out
    assert then in out
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\S+) ", out)]
    assert losses[-1] < losses[0] - 0.2, losses
    assert number(r"loss and gradient norm (\S+),", out) < 1e-4
    assert number(r"weights (\S+) \(limit", out) < 1e-4
    held = [int(count) for count in re.findall(r"(\d+) parameters on rank 0", out)]
    assert len(held) == 2
    assert held[0] != held[1]


def test_training_and_a_checkpoint_for_another_ep() -> None:
    out = launched(2, "examples/train_expert_parallel.py", "--inner", "eager", "--steps", "4")
    claims_of_training(out, "ep 1 x dp 2")


def test_training_with_experts_on_several_ranks() -> None:
    out = launched(4, "examples/train_expert_parallel.py", "--inner", "eager", "--steps", "3")
    assert "ep 2 x dp 2" in out
    assert "experts on 2 ranks each" in out
    claims_of_training(out, "ep 4 x dp 1")


@pytest.mark.slow
@pytest.mark.inductor
def test_training_as_the_page_says() -> None:
    claims_of_training(launched(2, "examples/train_expert_parallel.py"), "ep 1 x dp 2")


def test_two_hosts_played_by_one() -> None:
    """The command line of several hosts, each with one process, over one machine's loopback."""
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "moe")
    command = [*LAUNCH[:3], "--nnodes", "2", "--nproc-per-node", "1", *meet, "examples/expert_parallel.py", "--inner", "eager"]
    hosts = [
        subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [host.communicate(timeout=400)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert sum("MoE blocks in" in text for text in told) == 1  # only rank 0 speaks
    ends_well("".join(told), 2)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


# ---------------------------------------------------------------- the page
def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_the_python_of_the_page_is_a_program_for_four_processes(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    text = textwrap.indent(EAGER + AFRESH.join(blocks("python")), "    ")
    program.write_text(f"def main():\n{text}\n\nmain()\n")  # groups in a module's variables would outlive the interpreter
    out = launched(4, program, threads=3)  # of the world's group, in which DTensor's caches keep FSDP2's mesh
    assert "MoE blocks: 1 found, 1 rewritten, 0 left as they were" in out
    assert "experts 0..1 of 8 on this rank, 4 ranks" in out


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def commands() -> list[list[str]]:
    """Words of each shell command of the page and of the examples' own descriptions."""
    told = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    for name in ("expert_parallel", "train_expert_parallel"):
        described = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
        told += [line for line in described.splitlines() if "torch.distributed.run" in line]
    return [shlex.split(line) for line in told if line.strip()]


def test_commands_are_taken_by_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands()
    assert len(found) >= 8
    for words in found:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", words[at:])
        args = module_of(ROOT / words[at]).arguments()
        ranks = int(words[words.index("--nproc-per-node") + 1])
        ranks *= int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        if args.ep and hasattr(args, "tp"):
            assert ranks in (args.ep * args.tp * args.dp, args.tp * args.dp), words


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first column is called so."""
    table = TEXT.split(f"\n| {heading} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_field_and_its_default_is_on_the_page() -> None:
    told = {name.strip("`"): default for names, default, _ in rows("field") for name in names.split(", ")}
    fields = {f.name: f.default for f in dataclasses.fields(ParallelConfig)}
    assert set(told) == set(fields)
    for name, default in fields.items():
        assert told[name].strip("`") == (f'"{default}"' if isinstance(default, str) else str(default)), name


LAYER = Problem(
    "comm", device="cuda:0", dtype=torch.bfloat16, hidden=4096, num_experts=128, top_k=8, tokens=64, world=4, max_tokens=64, ids_valid=True
)


def test_the_table_of_providers_is_the_registry() -> None:
    named = [cells[0].strip("`") for cells in rows("provider")]
    assert sorted(named) == sorted(p.name for p in providers("comm") if p.name != "local")


@pytest.mark.parametrize("cells", rows("provider"), ids=lambda cells: cells[0])
def test_what_a_provider_takes(cells: list[str]) -> None:
    name, _, _, _, trains, fp8, graphs, hosts = (cell.strip("`") for cell in cells)
    (provider,) = (p for p in providers("comm") if p.name == name)
    asked = {
        trains: (dataclasses.replace(LAYER, training=True), "gradients are wanted"),
        f"fp8 {fp8}": (dataclasses.replace(LAYER, quant="fp8"), "quant is 'fp8'"),
        f"hosts {hosts}": (dataclasses.replace(LAYER, same_host=False), "host"),
        f"graphs {graphs}": (dataclasses.replace(LAYER, cuda_graphs=True), "CUDA graphs cannot hold it"),
    }
    for said, (problem, reason) in asked.items():
        why = provider.supports(problem) or ""
        assert (reason in why) == (said in ("no", "fp8 no", "hosts one", "graphs no")), (name, said, why)


def test_the_layouts_of_eight_ranks_are_those_of_the_code() -> None:
    from moe_compile.groups import _axes

    beside, spanning = (cells[2] for cells in rows("sizes"))
    for text, groups in ((beside, _axes(2, 2, 2, 8)), (spanning, _axes(8, 2, 4, 8))):
        for axis in ("ep", "tp"):
            told = " / ".join(",".join(map(str, ranks)) for ranks in groups[axis])
            assert f"{axis} groups {told}" in text or (axis == "ep" and "one ep group of all" in text), (axis, told)
    assert "the experts of rank 0 also on 1, 4, 5" in beside
    assert _axes(2, 2, 2, 8)["replica"][0] == [0, 1, 4, 5]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target


def test_the_picture_is_drawn_by_its_script() -> None:
    assert (ROOT / "docs" / "parallel.svg").read_text() == module_of(ROOT / "docs" / "parallel_picture.py").draw()
