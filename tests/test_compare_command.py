"""The command from end to end: exit codes, pairing errors, files, a page that loads nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report.compare.__main__ import main
from report.compare.limits import choose_limit
from tests.curve_noise import baselines

RECIPE = """
name: {name}
train: {{seed: {seed}, steps: 500, global_batch: 8, seq_len: 256}}
data: {{train: corpus, tokenizer: bpe}}
model: {{dtype: bf16, hidden_size: {hidden}}}
schedule: {{kind: wsd, warmup: 0.05, decay: 0.2}}
precision: {{policy: {policy}}}
"""


def run(
    folder: Path, losses: np.ndarray, seed: int = 0, policy: str = "bf16", batch: int = 8, hidden: int = 128
) -> str:
    """A run directory of these losses."""
    folder.mkdir(parents=True)
    lines = [
        {"kind": "step", "step": i, "samples": batch * i, "loss": loss, "grad_norm": 1.0, "step_time_s": 0.5}
        for i, loss in enumerate(losses.tolist(), 1)
    ]
    text = "".join(json.dumps(line).replace("NaN", "null") + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "resolved.yaml").write_text(RECIPE.format(name=folder.name, seed=seed, policy=policy, hidden=hidden))
    return str(folder)


def three(tmp_path: Path, gaps: Sequence[float], policy: str = "nvfp4") -> list[str]:
    """Arguments for baselines and candidates whose gaps are `gaps` percent and a little noise."""
    noise = np.random.default_rng(0).standard_normal((3, 500)) * 0.1
    losses = baselines()
    base = [run(tmp_path / f"base{i}", losses[i], i) for i in range(3)]
    ours = [run(tmp_path / f"cand{i}", losses[i] * (1 + (g + noise[i]) / 100), i, policy) for i, g in enumerate(gaps)]
    return [*base, "--candidate", *ours, "--out", str(tmp_path / "out")]


def test_within_outside_and_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = three(tmp_path, (0.3, 0.32, 0.28))
    assert main(words) == 0  # NVFP4's published limit, 1.5 %
    assert main([*words, "--limit", "0.1"]) == 1
    assert main([*words, "--limit", "0.3"]) == 2
    said = capsys.readouterr().out
    assert "within: the whole interval" in said and "undecided" in said and "precision.policy: bf16 -> nvfp4" in said
    tree = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert tree["verdict"] == "undecided" and tree["exit_code"] == 2 and tree["final"]["first"] == 401
    assert tree["final"]["gap"]["mean"] == pytest.approx(0.3, abs=0.02)
    assert [p["name"] for p in tree["phases"]] == ["warm-up", "stable", "decay"]
    assert [(p["first"], p["last"]) for p in tree["phases"]] == [(1, 25), (26, 400), (401, 500)]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_phases_from_options(tmp_path: Path) -> None:
    main([*three(tmp_path, (0.0, 0.0, 0.0)), "--warmup", "100", "--decay", "0.5"])
    phases = json.loads((tmp_path / "out" / "compare.json").read_text())["phases"]
    assert [(p["first"], p["last"]) for p in phases] == [(1, 100), (101, 250), (251, 500)]


def test_a_schedule_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = three(tmp_path, (0.0, 0.0, 0.0))
    recipe = Path(words[0]) / "resolved.yaml"
    recipe.write_text(recipe.read_text().replace("warmup: 0.05", "warmup: soon"))
    assert main(words) == 2
    assert "schedule.warmup is 'soon'" in capsys.readouterr().err


def test_one_pair_says_what_it_cannot_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = baselines()[0]
    words = [run(tmp_path / "base", losses), "--candidate", run(tmp_path / "cand", losses * 1.003), "--limit", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "not what another seed would give" in " ".join(capsys.readouterr().out.split())


def test_a_candidate_that_ends_in_nan_is_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = baselines()[0]
    lost = losses.copy()
    lost[450:] = np.nan
    words = [run(tmp_path / "base", losses), "--candidate", run(tmp_path / "cand", lost), "--out", str(tmp_path)]
    assert main(words) == 1
    assert "not finite in 50 of 100 final steps" in capsys.readouterr().out
    events = json.loads((tmp_path / "compare.json").read_text())["events"]
    assert events["candidate"]["nan"] == 50 and events["baseline"]["nan"] == 0
    lost[:] = np.nan
    assert main([words[0], "--candidate", run(tmp_path / "never", lost), "--out", str(tmp_path)]) == 1
    assert main([run(tmp_path / "nothing", lost), "--candidate", words[2], "--out", str(tmp_path)]) == 2


def text_log(path: Path, losses: np.ndarray, spacing: int = 1) -> str:
    lines = [f" iteration {i * spacing}/ 9999 | lm loss: {loss:.6E} |\n" for i, loss in enumerate(losses, 1)]
    path.write_text("".join(lines))
    return str(path)


def test_what_is_not_comparable_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = baselines()
    base, twin = run(tmp_path / "base", losses[0]), run(tmp_path / "twin", losses[0])
    text = text_log(tmp_path / "text.log", losses[0])
    cases = {
        "other batch: 16 against 8 samples at step 1": ([run(tmp_path / "b", losses[0], batch=16)], [base]),
        "model.hidden_size is 128 against 256": ([base], [run(tmp_path / "h", losses[0], hidden=256)]),
        "seeds 0, 1 have a run on one side only": ([base], [run(tmp_path / "s", losses[1], seed=1)]),
        "two baselines have seed 0": ([base, twin], [base]),
        "1 baselines and 2 candidates": ([text], [base, base]),
        "29 logged steps in common": ([base], [run(tmp_path / "short", losses[0][:29])]),
        "one line each 1 steps against each 10": ([text], [text_log(tmp_path / "ten.log", losses[0], 10)]),
        "do not change together": ([text], [text_log(tmp_path / "other.log", losses[1])]),
    }
    for message, (baseline, candidate) in cases.items():
        assert main([*baseline, "--candidate", *candidate, "--out", str(tmp_path / "out")]) == 2, message
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    vouched = [text, "--candidate", str(tmp_path / "other.log"), "--same-data", "--out", str(tmp_path / "out")]
    assert main(vouched) in (0, 1, 2)
    assert "whatever the files say" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a"],
        ["a", "--candidate", "b", "--seeds", "3"],
        ["--run", "nvfp4_10m"],
        ["--run", "nvfp4_10m", "--baseline", "bf16_10m", "--candidate", "x"],
        ["--run", "nvfp4_10m", "--baseline", "bf16_10m", "steps"],
        ["/nowhere", "--candidate", "/nowhere"],
    ],
)
def test_usage_errors_are_one_message_and_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("report.compare: ") and "Traceback" not in error


@pytest.mark.parametrize(
    "option",
    [
        ("--limit", "-1"),
        ("--limit", "nan"),
        ("--confidence", "100"),
        ("--final", "2"),
        ("--window", "1.5"),
        ("--jobs", "0"),
    ],
)
def test_options_out_of_range_are_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["a", "--candidate", "b", *option])
    assert ended.value.code == 2 and f"{option[1]!r} is not" in capsys.readouterr().err


def test_an_unwritable_folder_and_a_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = three(tmp_path, (0.0, 0.0, 0.0))[:-1]
    (tmp_path / "file").write_text("")
    assert main([*words, str(tmp_path / "file")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*words, str(tmp_path / "out")]) == 0
    assert "needs matplotlib" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "compare.png").exists() and (tmp_path / "out" / "compare.html").exists()


def test_limits_are_the_published_ones_in_their_own_units() -> None:
    assert (choose_limit("mxfp8", None, None).percent, choose_limit("mxfp8", None, None).unit) == (0.5, "perplexity")
    assert (choose_limit("nvfp4", None, None).percent, choose_limit("nvfp4", None, None).unit) == (1.5, "loss")
    assert choose_limit(None, None, None).percent == 0.5 and "default" in choose_limit(None, None, None).source
    assert choose_limit("mxfp8", None, "loss").source != choose_limit("mxfp8", None, None).source
    assert (choose_limit("nvfp4", 3.0, "perplexity").percent, choose_limit("nvfp4", 3.0, None).unit) == (3.0, "loss")


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in ("meta", "br", "img", "link", "rect", "line", "path"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def made_page(tmp_path: Path) -> Path:
    main(three(tmp_path, (0.3, 0.3, 0.3)))
    return tmp_path / "out" / "compare.html"


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    text = made_page(tmp_path).read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == [] and page.loads == []
    assert page.seen["svg"] == 3 and page.seen["table"] == 4 and "script" not in page.seen and "link" not in page.seen
    assert not re.search(r"https?:|url\(|@import", text)
    assert not re.search(r'="[^"]*nan', text) and "width=device-width" in text
    assert "prefers-color-scheme: dark" in text


def test_names_of_files_cannot_break_the_page(tmp_path: Path) -> None:
    losses = baselines()[0]
    evil = tmp_path / "<script>&amp;"
    main([run(evil, losses), "--candidate", run(tmp_path / "c", losses), "--out", str(tmp_path)])
    text = (tmp_path / "compare.html").read_text()
    assert "<script" not in text and "&lt;script&gt;&amp;amp;" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_fits_in_a_browser(tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    page = made_page(tmp_path)
    probe = "<script>document.title='wide '+document.documentElement.scrollWidth</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>wide (\d+)</title>", done.stdout)
    assert found and int(found[1]) <= max(width, 500), done.stderr[-500:]  # headless windows are at least 500 wide
