"""A serving loop: load a checkpoint once, then answer the lines of standard input.

    echo "The capital of France is" | python examples/serve.py small --max-new-tokens 32

Text is written as it is generated; the speed of each answer goes to standard error.
"""

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import fips_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", help="folder written by fips compress")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).to(arguments.device).eval()
    fips_ext.verify(model)  # kernels and file are sound on this machine, or this says what is not

    for line in sys.stdin:
        prompt = tokenizer(line.strip(), return_tensors="pt").to(arguments.device)
        if prompt["input_ids"].shape[1] == 0:
            continue
        start = time.perf_counter()
        with torch.inference_mode():
            answer = model.generate(
                **prompt,
                max_new_tokens=arguments.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        count = answer.shape[1] - prompt["input_ids"].shape[1]
        print(f"{count / (time.perf_counter() - start):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
