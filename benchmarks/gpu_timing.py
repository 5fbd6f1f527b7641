"""What the GPU benchmarks share: the command line, races timed by events, graph replays and the result file.

A measurement is a *race*: our op and its rivals take turns in one process, round by round, so that clocks and
temperature hit all of them alike. Times are medians over rounds, a ratio is the median of the ratios of
single rounds, a spread is the distance between quartiles over the median. Forms of one rival are named
``rival/form``; the rival's time is that of its fastest form in each round.

Without a GPU ``--dry-run`` walks the same code on tiny shapes on the CPU, so that mistakes in a script show
where there is none; such a file says so and is never judged (goals.py).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from race import Race, Row, Run, save
from torch import Tensor

RACE_S = 0.25  # of rounds beyond the fewest
SLOW_S = 2.0  # a race of such calls has one round
MIN_ROUNDS, MAX_ROUNDS = 5, 41
SAMPLE_S = 2e-4  # shortest timed batch: well above the resolution of events
COLD_BYTES, COLD_L2 = 256 * 2**20, 3  # these bytes and as many times the L2 flush it
MAX_LAYERS = 512
COPY_BYTES = 2**31


class Bench:
    """One run of a GPU benchmark: arguments, races, rows that survive a failing case or a spent budget."""

    def __init__(self, doc: str, name: str, budget_s: float, argv: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        default = Path(f"benchmarks/results/gpu/{name}.json")
        parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
        parser.add_argument("--quick", action="store_true", help="the few cases that tell most")
        parser.add_argument("--budget", type=float, default=budget_s, help="seconds; later cases are skipped")
        parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: tries the script")
        args = parser.parse_args(argv)
        if not args.dry_run and not torch.cuda.is_available():
            parser.exit(2, "no CUDA GPU is visible to torch; --dry-run tries the script without one\n")
        self.name, self.out = name, args.out
        self.quick: bool = args.quick
        self.dry_run: bool = args.dry_run
        self.device = "cpu" if args.dry_run else "cuda"
        self.rows: list[Row] = []
        self.extra: Row = {}  # more keys of the result file
        self._start = time.monotonic()
        self._deadline = self._start + args.budget
        torch.manual_seed(0)
        self.machine = machine_info(self.dry_run) | {"copy_bytes_per_s": self._copy_rate()}
        print(f"{name}: {self.machine['device']}, copy {self.machine['copy_bytes_per_s'] / 1e12:.2f} TB/s")

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    # -- timing -------------------------------------------------------------------------------------------

    def race(
        self, runs: dict[str, Run], *, graph: bool = False, grad: bool = False, flush: bool = False
    ) -> Race:
        """Times ``runs``, one of them named ``ours``.

        Args:
            graph: capture each in a CUDA graph and time its replays, as decoding is run.
            grad: whether autograd records.
            flush: overwrite the L2 before every call.
        """
        with torch.set_grad_enabled(grad):
            if self.dry_run:
                return Race({name: [wall_seconds(run)] for name, run in runs.items()})
            return self._race(runs, graph, flush)

    def cold_bytes(self) -> int:
        """So many bytes that the L2 holds little of what was read one round before."""
        return max(COLD_BYTES, COLD_L2 * self.machine.get("l2_bytes", 0))

    def layers(self, nbytes: int) -> int:
        """How many distinct layers of ``nbytes`` of weights keep those out of the L2; 2 in a dry run."""
        return 2 if self.dry_run else min(MAX_LAYERS, max(2, math.ceil(self.cold_bytes() / nbytes)))

    def measure(
        self, keys: Row, make: Callable[[], Run], work: float, unit: str = "FLOP/s", flush: bool = False
    ) -> None:
        """A row about one runner, with its rate; ``make`` is called, and may fail, inside the case."""

        def rows() -> Iterable[Row]:
            seconds = self.race({"ours": make()}, flush=flush).seconds()
            yield {"seconds": seconds, "rate": work / seconds, "unit": unit, "flushed": flush}

        self.attempt(keys, rows)

    def _race(self, runs: dict[str, Run], graph: bool, flush: bool) -> Race:
        ready: dict[str, tuple[Run, float]] = {}
        errors: dict[str, str] = {}
        for name, run in runs.items():
            try:
                started = captured(run) if graph else run
                ready[name] = started, warm_seconds(started)
            except Exception as error:  # a rival that fails is a result too
                if name == "ours":
                    raise
                errors[name] = describe(error)
        scratch = torch.empty(self.cold_bytes() if flush else 1, dtype=torch.uint8, device=self.device)
        once = sum(seconds for _, seconds in ready.values())
        rounds = 1 if once > SLOW_S else max(MIN_ROUNDS, min(MAX_ROUNDS, int(RACE_S / once)))
        events: dict[str, list[tuple]] = {name: [] for name in ready}
        order = list(ready)
        for _ in range(rounds):
            for name in order:
                run, estimate = ready[name]
                calls = 1 if flush else max(1, math.ceil(SAMPLE_S / estimate))
                if flush:
                    scratch.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(calls):
                    run()
                end.record()
                events[name].append((start, end, calls))
            order.append(order.pop(0))  # nobody always runs after the same rival
        torch.cuda.synchronize()
        return Race(
            {name: [a.elapsed_time(b) / 1e3 / calls for a, b, calls in events[name]] for name in ready},
            errors,
        )

    def _copy_rate(self) -> float:
        """Bytes per second, read plus written, of a copy far larger than the L2."""
        size = 2**16 if self.dry_run else COPY_BYTES
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        race = self.race({"ours": lambda: target.copy_(source)})
        return 2 * size / min(race.times["ours"])

    # -- rows ---------------------------------------------------------------------------------------------

    def attempt(self, keys: Row, measure: Callable[[], Iterable[Row]]) -> None:
        """Adds the rows of ``measure()``; an error, or a spent budget, becomes a row of its own."""
        if time.monotonic() > self._deadline:
            self._add({**keys, "skipped": "the time budget is spent"})
        else:
            try:
                for row in measure():
                    self._add({**keys, **row})
            except Exception as error:
                self._add({**keys, "error": describe(error)})
            if not self.dry_run:
                torch.cuda.empty_cache()
        self._save()

    def finish(self) -> int:
        """The exit code: 1 after an error. A missed goal is a result, not an error."""
        self._save()
        skipped, errors = (sum(kind in row for row in self.rows) for kind in ("skipped", "error"))
        seconds = time.monotonic() - self._start
        print(
            f"{len(self.rows)} rows ({skipped} skipped, {errors} errors) in {seconds:.0f} s, in {self.out}\n"
        )
        return 1 if errors else 0

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{label(row):74} {figures(row)}", flush=True)

    def _save(self) -> None:
        content = {
            "benchmark": self.name,
            "dry_run": self.dry_run,
            "quick": self.quick,
            "machine": self.machine,
            **self.extra,
            "rows": self.rows,
        }
        save(self.out, content)


def machine_info(dry_run: bool) -> Row:
    if dry_run:
        return {"device": "dry run on a CPU", "capability": 0, "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def wall_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return max(time.perf_counter() - start, 1e-9)


def warm_seconds(run: Run) -> float:
    """Seconds of one call when it is warm, roughly; of the first call where that is slow anyway."""

    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    seconds = wall_seconds(synchronised)
    for _ in range(3 if seconds < SLOW_S / 4 else 0):
        seconds = wall_seconds(synchronised)
    return seconds


def captured(run: Run) -> Run:
    """A replay of ``run`` as a CUDA graph; its results stay alive with it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # loads kernels and makes handles, which a capture must not
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def difference(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64; NaN where a value is."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def check_close(actual: Tensor, expected: Tensor, bound: float = 0.03) -> float:
    """The difference of two computations of one function: a wrong result must not count as a fast one."""
    found = difference(actual, expected)
    if not found <= bound:
        raise ValueError(f"wrong result: relative difference {found:.2g}, at most {bound} is rounding")
    return found


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def label(row: Row) -> str:
    short = {"T": "T={}", "x": "{}", "density": "p={}", "a": "a={}"}
    keys = ("case", "dtype", "T", "x", "a", "density", "block", "encoding", "shape")
    return " ".join(short.get(key, "{}").format(row[key]) for key in keys if row.get(key) not in (None, ""))


def figures(row: Row) -> str:
    for kind in ("skipped", "error"):
        if kind in row:
            return f"{kind}: {str(row[kind])[:110]}"
    if "rate" in row:
        return f"{row['seconds'] * 1e6:11.1f} us {row['rate']:10.3g} {row['unit']}"
    words = []
    if "threshold" in row:
        return f"{row['ours_s'] * 1e6:11.1f} us against {row['other_s'] * 1e6:.1f} us"
    if "seconds" in row:
        words.append(f"{row['seconds']['ours'] * 1e6:11.1f} us")
        words += [f"{ratio:.2f}x {name}" for name, ratio in row["ratio"].items()]
    words += [f"{key} {row[key]:.3g}" for key in SHOWN if key in row]
    return "  ".join(words)


SHOWN = (
    "e",
    "copy_share",
    "byte_limit_share",
    "memory_ratio",
    "excess_residual",
    "error_over_bound",
    "different",
)
