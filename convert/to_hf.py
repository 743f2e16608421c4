"""A run as a Hugging Face directory: python -m convert.to_hf RUN OUT [--step N] [--dtype fp32] [--tokenizer FILE]

RUN is a run directory. OUT gets the weights of its newest checkpoint, or of step N, from the highest precision that the
checkpoint holds, and the tokenizer that the run keeps as RUN/tokenizer.model or RUN/tokenizer.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from convert.files import Export, write_hf_directory
from convert.hf import hf_config
from errors import UsageError, UserError
from model.config import ModelConfig
from model.weights import check_weights
from parallel import catalog
from parallel.checkpoint import load_weights, read_meta

Dtype = Literal["bf16", "fp32"]


def find_tokenizer(run: Path, given: str | None) -> Path | None:
    """The tokenizer to export: `given` ("none" for none), or the one in the run directory; UsageError if neither."""
    if given is not None:
        return None if given == "none" else Path(given)
    found = [path for path in (run / "tokenizer.model", run / "tokenizer.json") if path.is_file()]
    if not found:
        raise UsageError(f"{run} keeps no tokenizer; give one with --tokenizer FILE, or --tokenizer none")
    return found[0]


def to_hf(run: Path, out: Path, step: int | None, dtype: Dtype | None, tokenizer: str | None) -> None:
    """Convert a checkpoint of `run`; raises UserError."""
    checkpoint = run if step is None else run / catalog.FOLDER / catalog.folder_name(step)
    if not checkpoint.is_dir():
        raise UsageError(f"{checkpoint} does not exist; give a run directory, and a --step that it has kept")
    recipe = read_meta(checkpoint)["recipe"]
    # Sizes of Mamba mean something with a pattern alone, which hf_config refuses.
    config = ModelConfig(**{key: value for key, value in recipe["model"].items() if key != "mamba"})
    export = Export(
        seq_len=recipe["train"]["seq_len"], dtype=dtype or config.dtype, tokenizer=find_tokenizer(run, tokenizer)
    )
    hf_config(config, export.seq_len)  # refuses a model without equivalent before reading gigabytes
    weights = check_weights(config, load_weights(checkpoint), checkpoint)
    write_hf_directory(out, config, weights, export)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert.to_hf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--step", type=int, help="checkpoint after this step (default: the newest)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights written (default: the model's)")
    parser.add_argument("--tokenizer", metavar="FILE", help=".model or tokenizer.json, or none (default: the run's)")
    options = parser.parse_args(arguments)
    try:
        to_hf(options.run, options.out, options.step, options.dtype, options.tokenizer)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
