"""Coverage-guided fuzzing of the loader by atheris (`make fuzz`); arguments are those of libFuzzer."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fips_ext"], enable_loader_override=False):
    from .hostile import HostileCheckpoint

import torch


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = HostileCheckpoint(Path(folder))
        corpus = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("-")))
        corpus.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(checkpoint.seeds()):
            (corpus / f"sound-{i}").write_bytes(seed)
        atheris.Setup(sys.argv, checkpoint.read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
