"""The wheel, alone in an environment: the same text from `fips generate` and from transformers.

    python tests/smoke_wheel.py DENSE TEXT

Run with the interpreter of that environment, outside of the source tree. DENSE is a small transformers model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT, TOKENS = "Line 7 says that", 24
PROGRAM = f"""
import fips_ext
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("out")
tokenizer = AutoTokenizer.from_pretrained("out")
prompt = tokenizer({PROMPT!r}, return_tensors="pt")
found = model.generate(**prompt, max_new_tokens={TOKENS}, do_sample=False)
print(tokenizer.decode(found[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def main(dense: str, text: str) -> None:
    python = sys.executable
    fips = str(Path(python).parent / "fips")
    with tempfile.TemporaryDirectory() as folder:

        def output(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        options = ["--ratio", "0.8", "--tokens", "4096", "--steps", "2", "--calib", text]
        output(fips, "compress", dense, "--out", "out", *options)
        generated = output(fips, "generate", "out", PROMPT, "--max-new-tokens", str(TOKENS))
        loaded = output(python, "-c", PROGRAM)
        output(fips, "report", "out", "--no-measure")
        print(output(fips, "doctor", "out"))
    assert generated.strip(), "nothing was generated"
    assert loaded == generated, f"transformers says {loaded!r}, fips generate {generated!r}"
    print(f"the same text twice: {generated.strip()!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
