"""The entry point: commands, exit codes, and the one line that every mistake gets.

0 done; 1 our bug, with its traceback; 2 the user can fix it: one line `muralist: error: WHERE: WHAT; FIX` on standard error;
130 interrupted, with the line that says how to go on. Modules of commands import nothing heavy at the top, so that `--help` and
wrong options answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from muralist.cli import bench, compare, diagnose, doctor, eval, generate, import_, inspect, plan, psd, recipes, resume, score, train
from muralist.cli._options import canonical, notes
from muralist.cli._show import Interrupted, error_line

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}

app = typer.Typer(
    name="muralist",
    help="Ultra-high-resolution, long video from text, on Wan2.1 and Wan2.2.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": canonical, "help_option_names": ["-h", "--help"]},
)
for module in (generate, resume, plan, inspect, eval, diagnose, psd, recipes, doctor, train, import_, score, compare, bench):
    app.command(module.__name__.rpartition(".")[2].rstrip("_"), context_settings=getattr(module, "CONTEXT", None))(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        from muralist import __version__

        typer.echo(f"muralist {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Show the version.")) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str] | None = None) -> None:
    """The console script."""
    sys.exit(main(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    notes.clear()
    try:
        code = app(args=arguments, prog_name="muralist", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: say nothing, also not at exit
        return 0
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"muralist: interrupted{stop}", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, debug="--debug" in arguments)


def _report(error: Exception, *, debug: bool) -> int:
    line = error_line(error)
    if line is None or debug:
        traceback.print_exception(error)
    if line is None:
        print("muralist: this is a bug of muralist; please report it with the lines above", file=sys.stderr)
        return 1
    print(f"muralist: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
