"""Imports point one way, and some third parties live in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Package, top-level module or command in a folder of a package -> what it may import from us; a missing edge is a
# review, not an accident. The rest of the package does not import such a command.
ALLOWED = {
    "errors": set(),
    "sections": set(),
    "strict_yaml": {"errors"},
    "data": {"errors"},
    "model": {"errors"},
    "lowprec": {"errors"},
    "parallel": {"errors", "lowprec"},
    "report": {"errors"},
    "report.compare": {"errors", "strict_yaml", "recipe"},
    "report.plan": {"errors", "strict_yaml", "recipe", "model", "lowprec", "parallel", "report", "run"},
    "report.probe": {"errors", "lowprec", "report"},
    "report.bisect": {"errors", "lowprec", "parallel", "run", "train"},
    "report.table": {"errors", "report", "report.compare"},
    "recipe": {"errors", "sections", "strict_yaml", "data", "model", "lowprec", "parallel", "report"},
    "run": {"errors", "recipe", "sections", "data", "model", "lowprec", "parallel", "report"},
    "convert": {"errors", "recipe", "data", "model", "lowprec", "parallel", "report", "run"},
    "bench": {
        *("errors", "recipe", "data", "model", "lowprec", "parallel", "report", "report.compare", "report.plan"),
        *("run", "train"),
    },
    "train": {"errors", "recipe", "data", "model", "lowprec", "parallel", "report", "report.plan", "run"},
    "slurm": {"errors", "strict_yaml", "recipe", "parallel", "report", "report.plan", "run"},
}
ONLY_IN = {
    "transformer_engine": {"lowprec/te.py", "lowprec/te_layers.py"},
    "deepspeed": {"lowprec/zero.py"},
    "pydantic": {"recipe.py"},
}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def _sources(root: Path) -> list[Path]:
    return [*root.glob("*.py"), *(p for top in ALLOWED for p in root.glob(f"{top}/**/*.py"))]


def _owner(module: str) -> str:
    """The entry of ALLOWED that a dotted name belongs to: its first two parts, or the first."""
    parts = module.split(".")
    folder = ".".join(parts[:2])
    return folder if folder in ALLOWED else parts[0]


def violations(root: Path) -> Iterator[str]:
    for path in _sources(root):
        place = path.relative_to(root)
        mine = _owner(".".join(place.with_suffix("").parts))
        for name in _imported(path):
            theirs, top = _owner(name), name.split(".")[0]
            if theirs in ALLOWED and theirs != mine and theirs not in ALLOWED[mine]:
                yield f"{place} imports {name}"
            if top in ONLY_IN and place.as_posix() not in ONLY_IN[top]:
                yield f"{place} imports {name}"


def test_imports_point_one_way():
    assert not list(violations(ROOT))


def test_every_top_level_package_is_covered():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    modules = {p.stem for p in ROOT.glob("*.py")}
    assert packages | modules == {name for name in ALLOWED if "." not in name}


def test_planted_violations_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bad.py").write_text("import run.build\nfrom deepspeed import comm\nimport torch\n")
    assert list(violations(tmp_path)) == ["model/bad.py imports run.build", "model/bad.py imports deepspeed"]
    (tmp_path / "model" / "bad.py").write_text("")
    (tmp_path / "report" / "compare").mkdir(parents=True)
    (tmp_path / "report" / "metrics.py").write_text("from report.compare.pairing import pair\n")
    (tmp_path / "report" / "compare" / "bad.py").write_text("import train\nfrom report.compare.pairing import pair\n")
    assert set(violations(tmp_path)) == {
        "report/metrics.py imports report.compare.pairing",
        "report/compare/bad.py imports train",
    }


def test_environment_is_read_only_where_a_run_starts():
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in _sources(ROOT)
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    }
    assert readers <= {"train.py"} | {name for name in readers if name.startswith("slurm/")}


def test_no_globals_and_no_swallowed_exceptions():
    for path in _sources(ROOT):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), f"{path}: global"
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(s, ast.Pass) for s in node.body), f"{path}:{node.lineno} swallows"


def test_files_stay_readable():
    for path in _sources(ROOT):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; is it one thing?"
