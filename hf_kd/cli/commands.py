"""The subcommands: parse, plan, run, print. Imported when one is run; `hf-kd --help` needs none of it."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from .. import hub
from ..experiment.plan import plan, resumes
from ..experiment.run import resume, run
from ..experiment.summary import introduction, summary
from ..launcher import launch_command, resume_command
from ..push import check_push, publish
from ..ranks import RankFailure, failures_named, prefix
from ..reporting.card import title
from ..reporting.record import RUN_FILE, read_record
from ..stopping import EXIT_STOPPED, TrainingStopped, stop_request
from .arguments import command_to_record, parse


def run_command(name: str, argv: list[str]) -> int:
    """Runs "distill", "resume" or "push". Returns the exit status, see `main`."""
    traceback, folder, only, status = "--traceback" in argv, None, None, 1
    try:
        with stop_request.listening(), failures_named():
            if name == "push":
                _push(argv)
            elif name == "resume":
                parser = _folder_parser(name, "Go on with an interrupted experiment, as its plan.json describes it.")
                parser.add_argument("--only", help="Go on with one run of a comparison alone: variant:seed.")
                arguments = parser.parse_args(argv)
                folder, only = arguments.folder, arguments.only
                resume(folder, only)
            else:
                status = 2
                script, config = parse(argv)
                traceback, status = script.traceback, 1
                experiment = plan(script, config, shlex.join(launch_command(["distill", *command_to_record(argv)])))
                folder, only = experiment.output_dir, script.only
                if config.process_index == 0:
                    print(summary(experiment) if script.dry_run else introduction(experiment))
                if not script.dry_run:
                    run(experiment, resume=resumes(config), token=config.hub_token, only=only)
    except (KeyboardInterrupt, TrainingStopped) as stop:
        print(f"\n{prefix()}{str(stop) or 'stopped'}", file=sys.stderr)
        if folder and Path(folder).is_dir():
            print(f"Resume with: {resume_command(folder, only)}", file=sys.stderr)
        return EXIT_STOPPED if isinstance(stop, TrainingStopped) else 130
    except Exception as error:
        message = hub.user_message(error)
        expected: tuple[type[Exception], ...] = (ValueError, OSError, FloatingPointError, RankFailure)
        if message is None and isinstance(error, expected + (TypeError, ImportError) * (status == 2)):
            message = str(error)
        if traceback or message is None:  # the traceback helps with an error that is not expected
            raise
        print(f"\nerror: {prefix()}{message}", file=sys.stderr)
        if folder and (notes := getattr(error, "__notes__", [])):  # where the state was saved
            print(*notes, f"Resume with: {resume_command(folder)}", sep="\n", file=sys.stderr)
        return status
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _folder_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"hf-kd {name}", description=description)
    parser.add_argument("folder", help="The output folder, with run.json or (of an interrupted experiment) plan.json.")
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback of an error.")
    return parser


def _push(argv: list[str]) -> None:
    parser = _folder_parser("push", "Push a student that hf_kd has saved, with its card.")
    parser.add_argument("repo_id", nargs="?", help="OWNER/NAME on the Hub. Default: the card's title, as yours.")
    parser.add_argument("--revision", help="Branch to push to; made if there is none. Default: main.")
    parser.add_argument("--private", action="store_true", default=None, help="Make the new repository private.")
    arguments = parser.parse_args(argv)
    record = read_record(arguments.folder)
    if "runs" in record:
        folders = {str(path.parent) for path in Path(arguments.folder).glob(f"*/**/{RUN_FILE}")}
        some = ", ".join(sorted(folders)[:9])
        raise ValueError(f"{arguments.folder} holds a comparison: push one of its students, such as {some}.")
    name = arguments.repo_id or record.get("repo_id") or (hub.repo_name(title(record)) if record else None)
    private = arguments.private or record.get("settings", {}).get("hub_private_repo")
    repo_id = check_push(name, private=private, folder=arguments.folder)
    print(f"Pushed to {publish(arguments.folder, repo_id, private=private, revision=arguments.revision)}")
