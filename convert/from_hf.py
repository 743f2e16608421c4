"""A Hugging Face model as initial weights: python -m convert.from_hf HF_DIR OUT

HF_DIR holds a Llama, Mistral or Qwen3 model (config.json, safetensors). OUT gets `model.safetensors` with this
repository's names and the dtypes of the source, the tokenizer files, and `model.yaml`: the `model:` section of a recipe
that starts from these weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import save_file

from convert.directory import new_directory
from convert.files import load_weights
from convert.hf import config_from_hf, from_hf_state
from errors import UsageError, UserError
from model.weights import WEIGHTS, check_weights


def from_hf(source: Path, out: Path) -> None:
    """Convert `source`; raises UserError."""
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source} is not a Hugging Face model directory: {error}") from None
    config = config_from_hf(settings)
    if problems := config.problems():
        raise UsageError(f"{source / 'config.json'}: {'; '.join(problems)}")
    weights = check_weights(config, from_hf_state(config, load_weights(source)), source)
    section = dataclasses.asdict(config) | {"init_from": str(out.resolve())}
    with new_directory(out) as directory:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        (directory / "model.yaml").write_text(yaml.safe_dump({"model": section}, sort_keys=False), encoding="utf-8")
        for name in ("tokenizer.model", "tokenizer.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert.from_hf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="directory with config.json and safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    options = parser.parse_args(arguments)
    try:
        from_hf(options.source, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out}; a recipe with `base: {options.out}/model.yaml` starts from these weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
