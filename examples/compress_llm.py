"""Compress a language model and measure what it cost.

    python examples/compress_llm.py demo:smollm2 --ratio 0.65 --out small

Text comes from the Wikipedia extract of the gensim package: one part calibrates, another is scored.
"""

import argparse

import fips_ext
from fips_ext import compress
from fips_ext.checkpoint import from_pretrained, save_pretrained
from fips_ext.evaluate import perplexity
from fips_ext.integrations.text import calibration_windows, token_windows, wikipedia
from fips_ext.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a transformers folder, a .gguf file, or demo:smollm2")
    parser.add_argument("--ratio", type=float, default=0.65, help="MLP bytes to keep")
    parser.add_argument("--out", default="small", help="folder for the checkpoint")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    text = wikipedia()
    scored = token_windows(text.held_out, tokenizer, length=512, limit=8)
    before = perplexity(model, scored)

    recipe = fips_ext.Recipe(ratio=arguments.ratio)
    data = calibration_windows(text.calibration, tokenizer, recipe.calibration_tokens)
    report = compress(model, recipe, data)  # in place
    save_pretrained(model, arguments.out, recipe=recipe, report=report, tokenizer=tokenizer)

    after = perplexity(from_pretrained(arguments.out), scored)
    print(report.to_markdown())
    print(
        f"perplexity on {after.tokens} tokens: {before.perplexity:.2f} before, {after.perplexity:.2f} after"
    )


if __name__ == "__main__":
    main()
