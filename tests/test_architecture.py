"""The rules of docs/structure.md that a program can check: imports, sizes, one definition, configs that compose."""

import ast
import importlib
from pathlib import Path

import pytest

from core.config import CONFIG_DIR, Command, groups, load

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "kernels", "qat", "draft_training", "convert", "infer")
PIPELINES = {"qat", "draft_training", "convert", "infer"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources(*rooms: str) -> list[Path]:
    return [p for room in rooms for p in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


ALL = sources(*ROOMS)


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_walks_only_through_doors(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    used = tops(path)
    assert not used & {"tests", "benchmarks", "notebooks"}
    if room in PIPELINES:
        assert not used & (PIPELINES - {room}), "pipelines meet in core, not in each other"
    if room == "core":
        assert not used & (PIPELINES | {"kernels"}), "fast ops reach core by value"
    if room == "kernels":
        ours = {n for n in imports(path) if n.split(".")[0] in ROOMS}
        assert all(n.startswith(("core.mxfp4", "core.errors", "kernels")) for n in ours), ours
    else:
        assert "triton" not in used, "Triton lives under kernels/"
    if room == "convert":
        assert "kernels" not in used
    if used & {"hydra", "omegaconf"}:
        assert path.relative_to(ROOT).as_posix() == "core/config.py", "Hydra ends at the door"


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    if path.name == "kernel.py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_the_grid_stands_in_one_file() -> None:
    """Any literal sequence that starts like the E2M1 magnitudes is a second definition of the format."""
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List) and all(isinstance(e, ast.Constant) for e in node.elts):
                values = [e.value for e in node.elts if isinstance(e, ast.Constant)]
                if values[:6] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]:
                    assert path.relative_to(ROOT).as_posix() == "core/mxfp4.py", path


def test_every_kernel_has_reference_test_and_benchmark() -> None:
    benches = " ".join(p.read_text() for p in sources("benchmarks"))
    for folder in sorted(p.parent for p in (ROOT / "kernels").glob("*/kernel.py")):
        assert (folder / "reference.py").exists(), folder
        tests = [p for p in (ROOT / "tests").rglob("*.py") if f"kernels.{folder.name}" in p.read_text()]
        assert tests, f"no test imports kernels.{folder.name}"
        assert f"kernels.{folder.name}" in benches, f"no benchmark imports kernels.{folder.name}"


def test_no_import_of_another_library_is_patched() -> None:
    """Assigning to an attribute of an imported module is monkeypatching."""
    for path in ALL:
        tree = ast.parse(path.read_text())
        modules = {
            a.asname or a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        assert target.value.id not in modules, f"{path}: {ast.unparse(target)}"


def commands() -> list[Command]:
    """Every entry module's COMMAND, found by its source: an entry without a test would be missed otherwise."""
    found = [p for p in ALL if "COMMAND = Command(" in p.read_text()]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in found]
    return [importlib.import_module(name).COMMAND for name in names]


CHOICES = [(c, f"{group}={name}") for c in commands() for group, names in groups(c).items() for name in names]


@pytest.mark.parametrize(("command", "choice"), CHOICES, ids=[f"{c.module} {choice}" for c, choice in CHOICES])
def test_every_yaml_composes_to_a_typed_object(command: Command, choice: str) -> None:
    config, _ = load(command, [choice])
    assert isinstance(config, command.schema)


def test_every_yaml_belongs_to_a_command() -> None:
    reached = {choice.removeprefix("+") for _, choice in CHOICES}
    for path in CONFIG_DIR.glob("*/*.yaml"):
        assert f"{path.parent.name}={path.stem}" in reached, f"{path}: no command takes it"


def test_no_yaml_names_a_class() -> None:
    for path in CONFIG_DIR.rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path
