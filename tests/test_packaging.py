"""The package as it is built and installed, its types, its style, and the README's two commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
HOMES = {"moe_compile": "moe_compile", "passes": "moe_compile.passes", "ops": "moe_compile.ops"}


def modules():
    """The package's modules as they install: dotted name -> file of the checkout."""
    found = {}
    for folder, package in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *inside]).removesuffix(".__init__")
            found[name] = path
    return found


def run(*command, **kwargs):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist of a copy of the checkout (building writes into the tree)."""
    base = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, base / "tree", ignore=shutil.ignore_patterns(".git", ".*", "__pycache__", "*.egg-info", "build"))
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", base, cwd=base / "tree")
    shutil.unpack_archive(next(base.glob("*.tar.gz")), base / "sdist")
    run(sys.executable, "-c", build, "build_wheel", base, cwd=next((base / "sdist").iterdir()))
    return next(base.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder to put on the path, with nothing but the unpacked wheel in it."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_packages_list_equals_the_tree():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    in_tree = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(config["packages"]) == in_tree
    assert config["package-dir"] == {package: folder for folder, package in HOMES.items()}


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in modules().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_the_tree_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_compile"}
    found = {name for name in names if name.endswith(".py")}
    wanted = {name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py") for name, path in modules().items()}
    assert found == wanted
    assert "moe_compile/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_installs_nothing_at_the_top_but_us(installed, tmp_path):
    code = """
import importlib.util, importlib.metadata, moe_compile, moe_compile.ops, moe_compile.passes
print(moe_compile.ops.__file__, moe_compile.passes.__file__)
print([importlib.util.find_spec(name) for name in ("ops", "passes")])
print(importlib.metadata.entry_points(group="torch_dynamo_backends", name="moe_compile"))
"""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    files, specs, entry = run(sys.executable, "-c", code, env=env, cwd=tmp_path).splitlines()
    assert files.count(str(installed)) == 2
    assert specs == "[None, None]"
    assert "moe_compile.named:moe_compile" in entry


def test_torch_logs_imports_the_installed_package_while_torch_imports(installed, tmp_path):
    code = "import torch, moe_compile.ops; torch.ops.moe_compile.combine.default; import moe_compile.passes"
    env = {**os.environ, "PYTHONPATH": str(installed), "TORCH_LOGS": "+moe_compile"}
    run(sys.executable, "-c", code, env=env, cwd=tmp_path)


def test_ops_and_passes_of_the_checkout_are_not_top_level(tmp_path):
    code = "import importlib.util; print([importlib.util.find_spec(name) for name in ('ops', 'passes')])"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[None, None]"


@pytest.mark.style
def test_types_check():
    """mypy on a tree of links that looks like the installed package: it cannot follow setuptools' package-dir."""
    links = ROOT / ".links"
    shutil.rmtree(links, ignore_errors=True)
    for folder, package in HOMES.items():
        target = links / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).iterdir():
            if path.name != "__pycache__":
                (target / path.name).symlink_to(path)
    run(sys.executable, "-m", "mypy", "-p", "moe_compile", cwd=ROOT)


@pytest.mark.style
def test_style():
    run(sys.executable, "-m", "ruff", "check", ROOT)
    run(sys.executable, "-m", "ruff", "format", "--check", ROOT)


def test_readme_starts_with_two_commands_and_ci_runs_the_second():
    block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    commands = block[1].strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        script = ROOT / command.split()[1]
        assert script.exists()
        run("sh", "-n", script)
    assert commands[1] in (ROOT / ".ci/run").read_text()
