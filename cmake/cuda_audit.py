"""Registers, shared memory and spills of every CUDA kernel, per architecture, against a budget.

Reads the output of a build with ``-Xptxas=-v`` (``make cuda-audit``) and prints one row per kernel template
and architecture: the number of instantiations, the registers per thread of the least and the most demanding
one, static shared memory, and local memory of the worst: spill stores and loads, or the stack frame where
that is more, as an array indexed at run time has nothing else to show. Exits with 1 if a kernel has more of
it than ``cuda_budget.json`` beside this file allows, or if an expected architecture is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BUDGET = Path(__file__).with_name("cuda_budget.json")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Kernel:
    """One instantiation for one architecture; sizes in bytes, registers per thread."""

    symbol: str
    arch: str
    registers: int
    shared: int
    local: int


def parse(log: str) -> list[Kernel]:
    """The kernels that ``ptxas -v`` reported in ``log``."""
    kernels = []
    symbol = arch = None
    local = 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            symbol, arch = match.groups()
            local = 0
        elif match := _SPILL.search(line):
            local = max(int(match[1]), int(match[2]) + int(match[3]))
        elif symbol is not None and (match := _USED.search(line)):
            kernels.append(Kernel(symbol, arch, int(match[1]), int(match[2] or 0), local))
            symbol = None
    return kernels


def demangle(symbols: list[str]) -> dict[str, str]:
    """Readable names, without template arguments of arguments."""
    result = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, result.stdout.splitlines(), strict=True))


def short_name(name: str) -> str:
    """``void fips::cuda::(anonymous namespace)::kernel<...>(Task)`` as ``kernel``."""
    name = name.replace("(anonymous namespace)::", "")
    return re.sub(r"^.*?(\w+)(<.*)?\(.*$", r"\1", name.split("<")[0] + "(")


def check(kernels: list[Kernel], names: dict[str, str], budget: dict) -> list[str]:
    """What breaks the budget, one sentence each."""
    problems = []
    for kernel in kernels:
        name = short_name(names[kernel.symbol])
        allowed = budget["local_bytes"].get(name, 0)
        if kernel.local > allowed:
            problems.append(
                f"{names[kernel.symbol]} has {kernel.local} bytes in local memory on {kernel.arch}; "
                f"{allowed} are allowed"
            )
    missing = set(budget["architectures"]) - {kernel.arch for kernel in kernels}
    problems += [f"no kernel was compiled for {arch}" for arch in sorted(missing)]
    return problems


def table(kernels: list[Kernel], names: dict[str, str]) -> str:
    """Rows per kernel template and architecture."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((short_name(names[kernel.symbol]), kernel.arch), []).append(kernel)
    rows = [("kernel", "arch", "variants", "registers", "static shared", "local")]
    for (name, arch), members in sorted(groups.items()):
        registers = sorted(member.registers for member in members)
        span = str(registers[-1]) if registers[0] == registers[-1] else f"{registers[0]}-{registers[-1]}"
        shared, local = (max(getattr(m, field) for m in members) for field in ("shared", "local"))
        rows.append((name, arch, str(len(members)), span, str(shared), str(local)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="output of the build")
    kernels = parse(parser.parse_args().log.read_text())
    names = demangle(sorted({kernel.symbol for kernel in kernels}))
    print(table(kernels, names))
    problems = check(kernels, names, json.loads(BUDGET.read_text()))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} over budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
