"""The console command `hf-kd`."""

import sys

USAGE = """usage: hf-kd distill ...      Distil an image classifier; `hf-kd distill --help` lists the arguments.
       hf-kd resume FOLDER    Go on with an experiment that was interrupted; see `hf-kd resume --help`.
       hf-kd push FOLDER      Push a distilled student to the Hub; see `hf-kd push --help`.
       hf-kd losses           List the losses: formula, needs, hyperparameters, published results.
       hf-kd --version        Print the version."""


def main(argv: list[str] | None = None) -> int:
    """The console command. Returns the exit status: 0, 1 after an error, 2 for wrong usage,
    75 after SIGTERM, SIGUSR1 or --max_hours (resume later), 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        from .. import __version__

        print(f"hf_kd {__version__}")
        return 0
    if argv == ["losses"]:
        from ..losses.overview import overview

        print(overview())
        return 0
    if not argv or argv[0] not in ("distill", "resume", "push"):
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if argv == ["distill"] or (argv[0] == "distill" and {"-h", "--help", "--help_all"} & set(argv)):
        from .arguments import make_parser  # without the trainer and what it imports

        make_parser(help_all="--help_all" in argv).print_help()
        return 0 if argv[1:] else 2
    try:
        from .commands import run_command

        return run_command(argv[0], argv[1:])
    except KeyboardInterrupt:  # in the seconds that imports take; run_command says more
        print("\nstopped", file=sys.stderr)
        return 130


__all__ = ["main"]
