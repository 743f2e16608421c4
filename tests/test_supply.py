"""Nothing that is read is trusted more than it must be, and no secret is written anywhere."""

from __future__ import annotations

import re
import shutil

import pytest

from errors import CheckpointError
from parallel import catalog
from parallel.checkpoint import locate, newest, open_checkpoint
from tests.checkpoint_case import save_alone
from tests.launch import ROOT, tiny, train

SOURCES = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("name", ["../../other/checkpoints/step-00000001", "/ABSOLUTE", "step-00000009", "..", ""])
def test_the_pointer_names_a_checkpoint_beside_it_or_nothing(tmp_path, name):
    for run in ("run", "other"):
        save_alone(tmp_path / run, 1)
    save_alone(tmp_path / "run", 2)
    absolute = str(tmp_path / "other" / "checkpoints" / "step-00000001")
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    pointer.write_text(name.replace("/ABSOLUTE", absolute) + "\n")
    assert catalog.pointed(pointer.parent) is None
    assert locate(tmp_path / "run") == tmp_path / "run"
    found = newest(tmp_path / "run")
    assert found is not None and found.path == tmp_path / "run" / "checkpoints" / "step-00000002"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".."])
def test_a_manifest_lists_files_beside_it_only(tmp_path, name):
    folder = save_alone(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("__0_0.distcp", name))
    with pytest.raises(CheckpointError, match="not names of files beside it"):
        open_checkpoint(folder)


def test_a_checkpoint_reached_through_a_copy_is_the_same(tmp_path):
    shutil.copytree(save_alone(tmp_path / "run", 1), tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").step == 1


def test_no_secret_of_the_environment_is_written(tmp_path):
    """Not in the recipe as it was resolved, the manifest, logs, metrics or checkpoints, nor on the screen."""
    secrets = {"WANDB_API_KEY": "local-5f2c9e11aa", "HF_TOKEN": "hf_Zk3sEcReT", "AWS_SECRET_ACCESS_KEY": "wJalrX+/K7"}
    done = train(tiny(tmp_path), "train.steps=2", "checkpoint.interval=1", variables=[secrets])
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    for content in [done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in written)]:
        assert not any(secret.encode() in content for secret in secrets.values())


def test_no_source_runs_a_shell_or_unpickles_freely():
    """Commands are lists of words; the one unpickler is the restricted one; torch loads weights only."""
    words = [
        r"shell=True",
        r"os\.system",
        r"os\.popen",
        r"pickle\.loads?\(",
        r"yaml\.(?!safe_load)\w*load\w*\(",
        r"(?<![.\w])(?:eval|exec)\(",
    ]
    free = re.compile("|".join(words))
    found = {
        f"{path.relative_to(ROOT)}: {match}"
        for path in SOURCES
        for match in free.findall(path.read_text())
        if path.name != "strict_yaml.py"  # yaml.load with a loader of its own, a SafeLoader
    }
    assert not found
    loads = [line for path in SOURCES for line in path.read_text().splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)
