"""Imports point one way, and some third parties live in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# package or top-level module -> what it may import from us; a missing edge is a review, not an accident
ALLOWED = {
    "errors": set(),
    "sections": set(),
    "strict_yaml": {"errors"},
    "data": {"errors"},
    "model": {"errors"},
    "lowprec": {"errors"},
    "parallel": {"errors", "lowprec"},
    "report": {"errors"},
    "recipe": {"errors", "sections", "strict_yaml", "data", "model", "lowprec", "parallel", "report"},
    "run": {"errors", "recipe", "sections", "data", "model", "lowprec", "parallel", "report"},
    "convert": {"errors", "recipe", "data", "model", "lowprec", "parallel", "report", "run"},
    "bench": {"errors", "recipe", "data", "model", "lowprec", "parallel", "report", "run", "train"},
    "train": {"errors", "recipe", "data", "model", "lowprec", "parallel", "report", "run"},
}
ONLY_IN = {"transformer_engine": {"lowprec/te.py"}, "deepspeed": {"lowprec/zero.py"}, "pydantic": {"recipe.py"}}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def _sources(root: Path) -> list[Path]:
    return [*root.glob("*.py"), *(p for top in ALLOWED for p in root.glob(f"{top}/**/*.py"))]


def violations(root: Path) -> Iterator[str]:
    for path in _sources(root):
        place = path.relative_to(root)
        mine = place.parts[0].removesuffix(".py")
        for name in _imported(path):
            top = name.split(".")[0]
            if top in ALLOWED and top != mine and top not in ALLOWED[mine]:
                yield f"{place} imports {name}"
            if top in ONLY_IN and place.as_posix() not in ONLY_IN[top]:
                yield f"{place} imports {name}"


def test_imports_point_one_way():
    assert not list(violations(ROOT))


def test_every_top_level_package_is_covered():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    modules = {p.stem for p in ROOT.glob("*.py")}
    assert packages | modules == set(ALLOWED)


def test_planted_violations_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bad.py").write_text("import run.build\nfrom deepspeed import comm\nimport torch\n")
    assert list(violations(tmp_path)) == ["model/bad.py imports run.build", "model/bad.py imports deepspeed"]


def test_environment_is_read_only_where_a_run_starts():
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in _sources(ROOT)
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    }
    assert readers <= {"train.py"}


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
