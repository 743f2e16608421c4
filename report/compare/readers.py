"""Logs to curves: metrics.jsonl, Megatron-LM and torchtitan text, TensorBoard events, CSV. The format is detected.

metrics.jsonl   an object a line; a last line that a running or killed process tore is left out
Megatron-LM     " iteration 1000/ 20000 | ... | lm loss: 3.147666E+00 | ... |": loss is the mean since the last line
                (`training_log` in megatron/training/training.py); Megatron-Bridge, NeMo and our train.log alike
torchtitan      "step: 10  loss: 7.1234  grad_norm: 1.2345 ..." (`MetricsProcessor.log` in
                torchtitan/components/metrics.py), colours removed
TensorBoard     scalars under the names in NAMES
CSV             a header with a step and a loss under the names in NAMES; "run - lm loss" is a W&B export
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from errors import UsageError
from report.compare.curves import COLUMNS, Curve, Rows, make_curve

# Column -> names under which it is found, the first one first.
NAMES = {
    "step": ("step", "_step", "iteration", "iter", "global_step"),
    "loss": ("loss", "lm loss", "lm_loss", "loss_metrics/global_avg_loss", "train_loss", "train/loss", "loss/out"),
    "validation": ("validation_loss", "lm loss validation", "validation_metrics/loss", "val_loss", "eval_loss"),
    "grad_norm": ("grad_norm", "grad-norm", "grad norm", "optim/grad_norm"),
    "seconds": ("step_time_s", "iteration-time", "time_metrics/end_to_end(s)"),
    "tokens": ("tokens", "consumed_tokens", "ntokens_seen", "optim/total_tokens"),
    "samples": ("samples", "consumed_samples", "consumed samples"),
    "skipped": ("skipped", "number of skipped iterations"),
    "nan": ("nan", "number of nan iterations"),
}
MEGATRON = re.compile(r"\biteration\s+(\d+)/\s*\d+\s*\|(.*)")
MEGATRON_VALIDATION = re.compile(r"validation loss at iteration (\d+)\b[^|]*\| lm loss value:\s*(\S+)")
TITAN = re.compile(r"(?<!validate )\bstep:\s*([\d,]+)\s+loss:\s*(\S+)(?:\s+grad_norm:\s*(\S+))?")
TITAN_VALIDATION = re.compile(r"validate step:\s*([\d,]+)\s+loss:\s*(\S+)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Found = tuple[Rows, dict[int, float]]


def read_curve(path: Path, loss: str | None = None) -> Curve:
    """The curve of a run directory, a folder of TensorBoard events, or a file.

    loss: name of the loss in the log, for one that NAMES does not have. Raises UsageError for what cannot be read.
    """
    try:
        if path.is_dir():
            return _read_folder(path, loss)
        if "tfevents" in path.name:
            return make_curve(path, "TensorBoard", *_tensorboard(path, loss))
        return _read_text(path, path.read_bytes(), loss)
    except OSError as error:
        raise UsageError(f"cannot read {error.filename or path}: {error.strerror or error}") from None


def _read_text(path: Path, raw: bytes, loss: str | None) -> Curve:
    if b"\0" in raw[:4096]:
        raise UsageError(f"{path} is a binary file; give a log, metrics.jsonl, CSV or TensorBoard events (*tfevents*)")
    text = COLOUR.sub("", raw.decode("utf-8-sig", errors="replace"))
    kind, reader = _detect(path, text)
    return make_curve(path, kind, *reader(path, text, loss))


def _read_folder(path: Path, loss: str | None) -> Curve:
    if (path / "metrics.jsonl").is_file():
        text = (path / "metrics.jsonl").read_text(errors="replace")
        return make_curve(path, "metrics.jsonl", *_jsonl(path / "metrics.jsonl", text, loss))
    if any(path.glob("*tfevents*")):
        return make_curve(path, "TensorBoard", *_tensorboard(path, loss))
    raise UsageError(f"folder {path} holds neither metrics.jsonl nor TensorBoard events (*tfevents*)")


def _detect(path: Path, text: str) -> tuple[str, Callable[[Path, str, str | None], Found]]:
    head = text.lstrip().split("\n", 1)[0]
    if head.startswith("{"):
        return "metrics.jsonl", _jsonl
    if MEGATRON.search(text):
        return "Megatron-LM log", _megatron
    if TITAN.search(text):
        return "torchtitan log", _titan
    if any(cell.lower() in NAMES["step"] for cell in _cells(head)):
        return "CSV", _csv
    what = f"its first line is {head[:80]!r}" if head else "it is empty"
    raise UsageError(
        f"cannot tell what {path} is ({what}): no JSON lines, no Megatron-LM or torchtitan lines,"
        " no CSV with a step column"
    )


def _number(value: object, where: str) -> float:
    """A float; null is NaN."""
    try:
        return float("nan") if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UsageError(f"{where}: {str(value).strip()[:40]!r} is not a number") from None


def _step(value: object, where: str) -> int:
    number = _number(value, where)
    if not 0 <= number < 2**53 or number != int(number):
        raise UsageError(f"{where}: {str(value)[:40]!r} is not a step")
    return int(number)


def _pick(record: Mapping[str, object], name: str, loss: str | None) -> object:
    """Value of a column under the first of its names that `record` has; None when it has none."""
    names = (loss,) if name == "loss" and loss else NAMES[name]
    return next((record[key] for key in names if record.get(key) is not None), None)


def _jsonl(path: Path, text: str, loss: str | None) -> Found:
    rows: Rows = {}
    validation: dict[int, float] = {}
    lines = text.splitlines()
    key = loss or "loss"
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break  # still being written, or torn by a kill
            raise UsageError(f"{where}: not JSON: {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise UsageError(f"{where}: not a JSON object: {line[:60]!r}")
        if "validation_loss" in record:
            step = record.get("step", max(rows, default=0))
            validation[_step(step, where)] = _number(record["validation_loss"], where)
        elif key in record:
            found = {name: _number(v, where) for name in COLUMNS if (v := _pick(record, name, loss)) is not None}
            rows[_step(record.get("step"), where)] = {**found, "loss": _number(record[key], where)}
    return rows, validation


def _megatron(path: Path, text: str, loss: str | None) -> Found:
    rows: Rows = {}
    for match in MEGATRON.finditer(text):
        where = f"{path}, iteration {match[1]}"
        fields = {key.strip(): value for key, _, value in (part.rpartition(":") for part in match[2].split("|"))}
        row = {name: _number(v, where) for name in COLUMNS if (v := _pick(fields, name, loss)) is not None}
        if (elapsed := fields.get("elapsed time per iteration (ms)")) is not None:
            row["seconds"] = _number(elapsed, where) / 1e3
        if "loss" not in row and loss is None:
            row["loss"] = float("nan")  # every step of the interval was skipped
        rows[int(match[1])] = row
    return rows, {int(m[1]): _number(m[2], f"{path}, validation") for m in MEGATRON_VALIDATION.finditer(text)}


def _titan(path: Path, text: str, loss: str | None) -> Found:
    if loss:
        raise UsageError(f"{path} is a torchtitan log, whose loss has one name; leave --loss {loss} out")
    rows: Rows = {}
    for match in TITAN.finditer(text):
        where = f"{path}, step {match[1]}"
        norm = {"grad_norm": _number(match[3], where)} if match[3] else {}
        rows[int(match[1].replace(",", ""))] = {"loss": _number(match[2], where), **norm}
    validation = TITAN_VALIDATION.finditer(text)
    return rows, {int(m[1].replace(",", "")): _number(m[2], f"{path}, validation") for m in validation}


def _cells(line: str) -> list[str]:
    """Cells of a CSV line; comma, semicolon or tab, whichever is most frequent."""
    delimiter = max(",;\t", key=line.count)
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]


def _match(path: Path, header: Iterable[str], name: str, loss: str | None = None) -> str | None:
    """The header's cell for a column; a W&B export writes "run - name". Raises UsageError when there are several."""
    header = list(header)
    for wanted in (loss,) if name == "loss" and loss else NAMES[name]:
        found = [h for h in header if wanted in (h, h.lower(), h.rpartition(" - ")[2])]
        if len(found) > 1:
            raise UsageError(f"{path}: {', '.join(map(repr, found))} could all be the {name}; keep one")
        if found:
            return found[0]
    return None


def _csv(path: Path, text: str, loss: str | None) -> Found:
    rows: Rows = {}
    validation: dict[int, float] = {}
    lines = text.lstrip().splitlines()
    header = _cells(lines[0])
    places = {name: header.index(cell) for name in NAMES if (cell := _match(path, header, name, loss)) is not None}
    if not places.keys() & {"loss", "validation"}:
        wanted = loss or ", ".join(NAMES["loss"])
        raise UsageError(f"{path} has no column {wanted}; it has {', '.join(header)}; name the loss with --loss")
    delimiter = max(",;\t", key=lines[0].count)
    for number, cells in enumerate(csv.reader(lines[1:], delimiter=delimiter), 2):
        where = f"{path}, line {number}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UsageError(f"{where}: {len(cells)} cells under {len(header)} columns")
        values = {name: _number(cells[at], where) for name, at in places.items() if cells[at].strip()}
        step = _step(values.pop("step", None), where)
        if "validation" in values:
            validation[step] = values.pop("validation")
        rows.setdefault(step, {}).update(values)
    return rows, validation


def _tensorboard(path: Path, loss: str | None) -> Found:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError:
        raise UsageError(
            f"{path} holds TensorBoard events, and the package tensorboard cannot be imported; pip install tensorboard"
        ) from None
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    rows: Rows = {}
    validation: dict[int, float] = {}
    if _match(path, tags, "loss", loss) is None:
        have = ", ".join(tags[:12]) or "no scalar at all"
        raise UsageError(f"{path} has no scalar {loss or ', '.join(NAMES['loss'])}; it has {have}; name it with --loss")
    for name in (*COLUMNS, "validation"):
        tag = _match(path, tags, name, loss)
        for event in events.Scalars(tag) if tag else ():
            if name == "validation":
                validation[event.step] = event.value
            else:
                rows.setdefault(event.step, {})[name] = event.value
    return rows, validation
