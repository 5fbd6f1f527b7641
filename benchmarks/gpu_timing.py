"""Timing on a CUDA device: events, medians, an optional L2 flush, and rows that survive a failing case."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU


def seconds_of(run: Callable[[], object], repeats: int = 20, flush: bool = False) -> tuple[float, float]:
    """Median seconds of one ``run()`` and the spread (quartile distance over median) of the repeats."""
    scratch = torch.empty(_FLUSH_BYTES if flush else 1, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    events = []
    for _ in range(repeats):
        if flush:
            scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) / 1e3 for start, end in events)
    median = statistics.median(times)
    return median, (times[(3 * repeats) // 4] - times[repeats // 4]) / median


class Results:
    """Rows of one benchmark. A case that raises becomes an error row; past the budget, a skipped one."""

    def __init__(self, out: Path, budget_s: float) -> None:
        self.out = out
        self.rows: list[dict] = []
        self._deadline = time.monotonic() + budget_s

    def measure(
        self,
        case: str,
        make: Callable[[], Callable[[], object]],
        *,
        dtype: str = "bfloat16",
        tokens: int = 0,
        shape: tuple = (),
        work: float = 0.0,
        unit: str = "FLOP/s",
        repeats: int = 20,
        flush: bool = False,
        **extra: object,
    ) -> float | None:
        """Times the function that ``make()`` returns; ``work`` per call gives the rate. Returns seconds."""
        row: dict = {"case": case, "dtype": dtype, "T": tokens, "shape": list(shape), **extra}
        seconds = None
        try:
            if time.monotonic() > self._deadline:
                raise TimeoutError("skipped: the time budget is spent")
            seconds, spread = seconds_of(make(), repeats, flush)
            row.update(seconds=seconds, spread=spread, rate=work / seconds, unit=unit, flushed=flush)
        except Exception as error:  # a rival that fails is a result too
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        torch.cuda.empty_cache()
        self.rows.append(row)
        self._print(row)
        return seconds

    def save(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        header = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({"machine": header, "rows": self.rows}, indent=1) + "\n")
        print(f"{len(self.rows)} rows in {self.out}")

    @staticmethod
    def _print(row: dict) -> None:
        name = f"{row['case']:34} {row['dtype']:9} T={row['T']:<6} {'x'.join(map(str, row['shape'])):24}"
        if "error" in row:
            print(f"{name} {row['error'][:90]}", flush=True)
        else:
            print(f"{name} {row['seconds'] * 1e6:11.1f} us {row['rate']:10.3g} {row['unit']}", flush=True)
