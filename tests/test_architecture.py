# SPDX-License-Identifier: Apache-2.0
"""House rules a machine can check: who imports whom, what loads when, what no file may contain."""

import ast
import fnmatch
import graphlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "harprune"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted(
    p for d in ("harprune", "tests", "bench", "examples") for p in (ROOT / d).rglob("*.py")
)

# What each part may import of the others: wings stand alone, and a recipe names what they make.
WINGS = {
    "models",
    "reporting",
    "robustness",
    "sparsity",
    "training",
    "deploy",
    "kernels",
    "methods",
}
# The ground: small things without a wing's knowledge, on which every wing may stand.
GROUND = {
    "arguments",
    "ascent",
    "files",
    "intervals",
    "modes",
    "nested",
    "outcomes",
    "pairing",
    "randomness",
    "user_code",
}
FLOORS = {
    **{part: set() for part in GROUND},
    "kernels": set(),
    "sparsity": {"kernels"},
    "deploy": {"kernels"},
    "robustness": set(),
    "training": set(),
    "models": set(),
    "reporting": set(),
    "methods": {"sparsity"},
    "recipe": WINGS - {"reporting"},
    "run": WINGS - {"deploy"} | {"recipe"},
    "grid": {"reporting", "recipe", "run"},
    "delivery": WINGS - {"methods"} | {"recipe", "run"},
    "cli": {"kernels", "deploy", "models", "training", "reporting"}
    | {"harprune", "recipe", "run", "grid", "delivery"},
    "harprune": set(),
    "__main__": {"cli"},
}
HEAVY = (
    "torch",
    "matplotlib",
    "sklearn",
    "scipy",
    "lightning_fabric",
    "pyautoattack",
    "PIL",
)


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """`harprune/sparsity/masks.py` -> `harprune.sparsity.masks`; `__init__` names its package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.Module, module: str, *, is_package: bool) -> list[str]:
    """Every dotted name a module imports, at its top or in a function, relative ones resolved."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            names += [f"{stem}.{alias.name}" for alias in node.names]
    return names


def imports_of(module: str) -> set[str]:
    """The modules of this package that `module` imports: each name's longest prefix that is one."""
    path = MODULES[module]
    names = imported_names(parse(path), module, is_package=path.name == "__init__.py")
    targets = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        targets.add(name)
    return targets - {"", module}


def part_of(module: str) -> str:
    """`harprune.sparsity.masks` -> `sparsity`; the package itself -> `harprune`."""
    return module.split(".")[1] if "." in module else module


def test_the_import_reader_sees_every_form():
    source = (
        "import harprune.cli\nfrom harprune import sparsity\nfrom .base import Method\n"
        "def f():\n    from ..robustness.attacks import PGD\n    from . import hydra\n"
    )
    names = imported_names(ast.parse(source), "harprune.methods.harp", is_package=False)
    assert names == [
        "harprune.cli",
        "harprune.sparsity",
        "harprune.methods.base.Method",
        "harprune.robustness.attacks.PGD",
        "harprune.methods.hydra",
    ]
    names = imported_names(ast.parse("from .base import M"), "harprune.methods", is_package=True)
    assert names == ["harprune.methods.base.M"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_on_their_floor(module):
    part = part_of(module)
    assert part in FLOORS, f"{module}: draw the new part '{part}' in the architecture and in FLOORS"
    wrong = {t for t in imports_of(module) if part_of(t) not in FLOORS[part] | GROUND | {part}}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


@pytest.mark.parametrize("part", sorted(FLOORS))
def test_every_arrow_is_walked(part):
    imported = {part_of(t) for m in MODULES if part_of(m) == part for t in imports_of(m)}
    assert not FLOORS[part] - imported, "an arrow that nothing needs; take it out of FLOORS"


def test_arrows_between_parts_have_no_circle():
    graphlib.TopologicalSorter(FLOORS).prepare()


def test_one_method_never_imports_another():
    files = [m for m in MODULES if m.startswith("harprune.methods.")]
    wrong = {
        (module, target)
        for module in files
        for target in imports_of(module)
        if part_of(target) == "methods" and target != "harprune.methods.base"
    }
    assert not wrong


def test_imports_have_no_circle():
    graphlib.TopologicalSorter({m: imports_of(m) for m in MODULES}).prepare()


def test_tests_mirror_the_package():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_nothing_is_called_utils():
    wrong = [
        p
        for p in PACKAGE.rglob("*")
        if p.stem.lower() in {"util", "utils", "helpers", "misc", "common"}
    ]
    assert not wrong


@pytest.mark.parametrize(
    "statement",
    [
        "import harprune.cli.main",
        "import sys; sys.argv = ['harprune', '--help']\nfrom harprune.cli.main import main; main()",
    ],
    ids=["import harprune.cli.main", "harprune --help"],
)
def test_the_command_line_answers_before_torch_is_loaded(statement):
    probe = (
        "import sys, atexit\n"
        f"loaded = lambda: sorted({set(HEAVY)!r} & set(sys.modules))\n"
        "atexit.register(lambda: print('LOADED', loaded(), file=sys.stderr))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe + statement], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("LOADED []"), done.stderr


def test_the_command_line_says_what_it_lacks():
    statement = (
        "import sys, runpy; sys.modules['typer'] = None\n"
        "runpy.run_module('harprune', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith("harprune: typer is not installed") and "pip install ." in said


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_opens_with_its_licence_and_its_purpose(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    marker = path.name == "__init__.py" and PACKAGE not in path.parents
    assert marker or ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_user_errors_are_not_asserts_and_nothing_is_unpickled(path):
    tree = parse(path)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert vanishes under -O; raise ValueError")
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "torch.load"
            and not loads_weights_only(node)
        ):
            faults.append(f"line {node.lineno}: torch.load needs weights_only=True")
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            faults.append(f"line {node.value.lineno}: allow_pickle must be False")
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    names = imported_names(tree, module_name(path), is_package=path.name == "__init__.py")
    names = [name for name in names if name != "pickle.UnpicklingError"]  # torch.load raises it
    faults += [f"imports {name}" for name in names if name.split(".")[0] in picklers]
    faults += [f"imports {name}, which hides torch.load" for name in names if name == "torch.load"]
    assert not faults


def loads_weights_only(call: ast.Call) -> bool:
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def test_every_data_file_of_the_package_is_installed():
    with (ROOT / "pyproject.toml").open("rb") as stream:
        declared = tomllib.load(stream)["tool"]["setuptools"]["package-data"]
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    # C sources are built, not installed; what they become is no data.
    files = [p for p in files if p.suffix != ".so" and p.parent.name != "native"]
    missing = [
        str(path.relative_to(ROOT))
        for path in files
        if not any(
            fnmatch.fnmatch(path.name, g) for g in declared.get(module_name(path.parent), [])
        )
    ]
    assert not missing


def test_no_file_names_a_path_of_this_machine():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        cwd=ROOT,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the repository is unknown")
    folders = [ROOT, ROOT.parent, Path.home()]
    folders += [Path(sys.prefix)] if sys.prefix != sys.base_prefix else []
    public = {Path("/"), Path(tempfile.gettempdir())}
    local = b"|".join(re.escape(bytes(folder)) for folder in folders if folder not in public)
    pattern = re.compile(rb"(?<![\w.~-])(?:" + local + rb")/")
    paths = [ROOT / name.decode() for name in listing.stdout.split(b"\0") if name]
    assert len(paths) > 10, "git lists too few files to be this repository"
    wrong = [
        f"{p.relative_to(ROOT)}: {m[0].decode()}"
        for p in paths
        if p.is_file() and (m := pattern.search(p.read_bytes()))
    ]
    assert not wrong
