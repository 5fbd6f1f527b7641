"""What the CPU benchmarks share: the command line, paired timing, the machine's peaks and the result file.

A measurement is a *race*: our op and its rivals take turns in one process, round by round, so that a clock or
a neighbour that slows the machine hits all of them. Times are medians over rounds, a ratio is the median of
the ratios of single rounds, and a spread is the distance between quartiles over the median.

The peaks that a roofline needs are measured in the same run: the GEMM rate of the vendor library for a dtype,
and the bandwidth from beyond the caches. Small cases run out of caches and can exceed the latter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from race import Race, Row, Run, dtype_name, save

from fips_ext import _library

QUICK_BUDGET_S = 240.0  # leaves a minute of the promised five for a case that is under way
BATCH_S = 3e-3  # shortest timed batch: well above the clock and the scheduler
MAX_ROUNDS = 15
RACE_S = 1.0  # of rounds beyond the fewest
LONG_RACE_S = 20.0  # two rounds are enough of a race that takes so long
PEAK_SIZE = 2048
STREAM_BYTES = 256 * 2**20
SLOW_PEAK_S = 5.0  # a dtype without vector instructions is not timed on the large product


@dataclasses.dataclass(frozen=True)
class Goal:
    """A threshold on one key of a row: at least ``must``, or at most."""

    id: str
    measure: str
    must: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.must if self.at_most else value >= self.must


def seconds_of(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def hold_race(runs: dict[str, Run], limit_s: float, min_rounds: int, deadline: float) -> Race:
    """Rounds until ``limit_s`` is spent, at least ``min_rounds`` of them unless the deadline comes first."""
    calls = {}
    for name, run in runs.items():
        estimate = seconds_of(run, 1)
        if estimate < BATCH_S:  # the first call paid for allocations and code caches
            estimate = seconds_of(run, 5)
        calls[name] = max(1, math.ceil(BATCH_S / estimate))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    start = time.monotonic()
    for finished in range(1, MAX_ROUNDS + 1):
        for name in order:
            if calls[name] > 1:
                runs[name]()  # refills the caches that the previous runner emptied
            times[name].append(seconds_of(runs[name], calls[name]))
        order.append(order.pop(0))  # nobody always runs after the same rival
        now = time.monotonic()
        spent = now - start
        if (
            now > deadline
            or (finished >= min_rounds and spent > limit_s)
            or (finished >= 2 and spent > LONG_RACE_S)
        ):
            break
    return Race(times)


# -- the machine ---------------------------------------------------------------------------------------------


def machine_info() -> dict:
    """What a reader needs to compare two result files; nothing that identifies a host."""
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "fips": json.loads(torch.ops.fips.build_info()),
        **cache_bytes(),
    }


def cache_bytes() -> dict[str, int]:
    """``l2_bytes`` and ``l3_bytes`` of the first core, as far as the kernel tells."""
    found = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if level >= 2 and size.endswith("K"):
            found[f"l{level}_bytes"] = int(size[:-1]) * 1024
    return dict(sorted(found.items()))


@torch.inference_mode()
def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: the best of a few, because a peak is not a typical time."""
    best = 0.0
    for size in (PEAK_SIZE // 4, PEAK_SIZE):
        if best and 2 * size**3 / best > SLOW_PEAK_S:
            break
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        torch.mm(a, b)
        fastest = min(seconds_of(lambda a=a, b=b: torch.mm(a, b), 1) for _ in range(5))
        best = max(best, 2 * size**3 / fastest)
    return best


@torch.inference_mode()
def stream_rates() -> tuple[float, float]:
    """Bytes per second of reading and of copying (read plus written) a buffer far larger than a core's L2."""
    source = torch.randn(STREAM_BYTES // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    read = min(seconds_of(source.sum, 1) for _ in range(5))
    copy = min(seconds_of(lambda: target.copy_(source), 1) for _ in range(5))
    return STREAM_BYTES / read, 2 * STREAM_BYTES / copy


def fresh_write_rate() -> float:
    """Bytes per second of the first write to memory the allocator has just mapped: page faults and all.

    Results larger than the 32 MB from which glibc maps every allocation anew pay it, ours and the rivals'.
    """
    size = STREAM_BYTES // 4
    return size / min(seconds_of(lambda: torch.ones(size // 4), 1) for _ in range(3))


# -- a session: arguments, rows and the file -----------------------------------------------------------------


def parse_arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid, under five minutes on two cores")
    parser.add_argument("--shapes", help="'d,n;d,n…' in place of the model shapes; the first is swept most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after every case")
    parser.add_argument("--threads", type=int, help="default: one per physical core")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Session:
    """One run of a benchmark: races under a time budget, rows that survive a failing case, a summary."""

    def __init__(self, doc: str) -> None:
        self._start = time.monotonic()
        self.args = args = parse_arguments(doc)
        _library.require()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.quick: bool = args.quick
        self.rows: list[Row] = []
        self._deadline = self._start + (QUICK_BUDGET_S if args.quick else math.inf)
        read, copy = stream_rates()
        peaks = {name: gemm_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
        rates = {"peak_flops": peaks, "read_bytes_per_s": read, "copy_bytes_per_s": copy}
        rates["fresh_write_bytes_per_s"] = fresh_write_rate()
        self.machine = machine_info() | rates
        self._print_header()

    def race(self, runs: dict[str, Run], *, min_rounds: int = 3, grad: bool = False) -> Race:
        """Times ``runs``, one of them named ``ours``; without ``grad`` in inference mode."""
        with torch.inference_mode(not grad):
            return hold_race(runs, RACE_S, min_rounds, self._deadline)

    def row(
        self,
        race: Race,
        rival: str,
        dtype: torch.dtype,
        *,
        flops: float,
        nbytes: float,
        goal: Goal | None = None,
        **extra: object,
    ) -> Row:
        """One comparison; ``flops`` and ``nbytes`` are what a perfect kernel would still have to do."""
        ours = race.seconds("ours")
        limit = max(flops / self._peak(dtype), nbytes / self.machine["read_bytes_per_s"])
        row: Row = {
            "ours_s": ours,
            "rival": rival,
            "rival_s": race.seconds(rival),
            "ratio": race.ratio(rival),
            "spread": race.spread(rival),
            "roofline_share": limit / ours,
            **extra,
        }
        return row | judge(row, goal)

    def attempt(self, keys: Row, measure: Callable[[], Iterable[Row]]) -> None:
        """Adds the rows of ``measure()``; an error, or a spent budget, becomes a row of its own."""
        if time.monotonic() > self._deadline:
            self.add({**keys, "skipped": "the time budget is spent"})
        else:
            try:
                for row in measure():
                    self.add({**keys, **row})
            except Exception as error:
                self.add({**keys, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        self._save()

    def add(self, row: Row) -> None:
        absent = {"goal": "", "must": None, "met": None}
        self.rows.append(absent | row)
        self._print(self.rows[-1])

    def finish(self) -> int:
        """Prints the summary; the exit code is 1 after an error. A missed goal is a result, not an error."""
        self._save()
        judged = [row for row in self.rows if row["met"] is not None]
        missed = [row for row in judged if not row["met"]]
        skipped, errors = (sum(kind in row for row in self.rows) for kind in ("skipped", "error"))
        minutes = (time.monotonic() - self._start) / 60
        print(f"\n{len(self.rows)} rows ({skipped} skipped, {errors} errors) in {minutes:.1f} min")
        print(f"goals met: {len(judged) - len(missed)} of {len(judged)}")
        for row in missed:
            print(f"  {_verdict(row)}: {_label(row)} over {row['rival']}")
        return 1 if errors else 0

    def _peak(self, dtype: torch.dtype) -> float:
        peaks = self.machine["peak_flops"]
        name = dtype_name(dtype)
        if name not in peaks:
            peaks[name] = gemm_peak(dtype)
        return peaks[name]

    def _save(self) -> None:
        if self.args.json is None:
            return
        content = {"machine": self.machine, "command": command_line(self.args), "rows": self.rows}
        save(self.args.json, content)

    def _print_header(self) -> None:
        m = self.machine
        print(f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads; torch {m['torch']} {m['torch_isa']}")
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in m["peak_flops"].items())
        read, copy = m["read_bytes_per_s"] / 1e9, m["copy_bytes_per_s"] / 1e9
        fresh = m["fresh_write_bytes_per_s"] / 1e9
        print(
            f"fips {m['fips']['cpu_isa']}; GEMM {rates}; read {read:.1f} GB/s, copy {copy:.1f} GB/s,", end=" "
        )
        print(f"first write {fresh:.1f} GB/s\n")
        columns = f"{'ours ms':>10} {'rival ms':>10} {'ratio':>7} {'e':>6} {'roof':>6}"
        print(f"{'case':68} {'rival':18} {columns}  goal", flush=True)

    @staticmethod
    def _print(row: Row) -> None:
        label = f"{_label(row):68}"
        for kind in ("skipped", "error"):
            if kind in row:
                print(f"{label} {kind}: {str(row[kind])[:100]}", flush=True)
                return
        times = f"{row['ours_s'] * 1e3:10.3f} {row['rival_s'] * 1e3:10.3f} {row['ratio']:7.2f}"
        e = f"{row['e']:6.2f}" if "e" in row else " " * 6
        rates = f"{times} {e} {row['roofline_share']:6.2f}"
        print(f"{label} {row['rival']:18} {rates}  {_verdict(row)}", flush=True)


def judge(row: Row, goal: Goal | None) -> Row:
    """The goal keys of a row that already holds what the goal measures."""
    if goal is None:
        return {"goal": "", "must": None, "met": None}
    value = row[goal.measure]
    bound = "at most" if goal.at_most else "at least"
    judged = {"measure": goal.measure, "bound": bound, "must": goal.must, "met": goal.met(value)}
    return {"goal": goal.id, **judged}


def command_line(args: argparse.Namespace) -> str:
    """The command without ``--json``, which changes no result and may name a folder of this machine."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(args).items():
        if name == "json" or value is None or value is False:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", shlex.quote(str(value))]
    return " ".join(words)


def _label(row: Row) -> str:
    keys = ("case", "dtype", "T", "density", "block", "encoding")
    short = {"T": "T={}", "density": "p={}"}
    return " ".join(short.get(key, "{}").format(row[key]) for key in keys if row.get(key) not in (None, ""))


def _verdict(row: Row) -> str:
    if row["met"] is None:
        return ""
    value = f"{row['measure']} {row[row['measure']]:.2f} ({row['bound']} {row['must']})"
    return f"{row['goal']} {value} {'met' if row['met'] else 'MISSED'}".strip()
