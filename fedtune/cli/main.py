"""The command `fedtune`: parses arguments, calls one command, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# Before anything imports torch or transformers: no threads that tokenizers would fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads sleep rather than spin while they wait: the same speed on a quiet machine, twice to four times the
# speed where something else runs beside it (docs/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Flower reads it when it is imported: nothing is told to anybody outside the federation.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from fedtune import __version__
from fedtune.cli import audit, ledger, model_hash, provision, report, run_arguments, server, site, watch
from fedtune.spec import FedtuneError

_SIMULATE = """\
Run a federation on this machine.

Overrides are key=value in Hydra's grammar, for instance
  fedtune simulate                                   four banks, Banking77, epsilon 8
  fedtune simulate experiment=debug                  seconds, random tiny model
  fedtune simulate privacy.epsilon=3 name=tighter
  fedtune simulate privacy=none                      no privacy, for comparison
  fedtune simulate -m privacy.epsilon=1,3,8          one run for each value
  fedtune simulate resume=runs/tighter               continue after Ctrl-C or a crash
docs/configuration.md lists every key.
"""

_EVALUATE = """\
Score a run's saved adapter on a file of your own.

The file has the columns that the run's configuration names; scores are exact and not covered by any guarantee.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 3 refused, 1 anything else."""
    options = _options(report.with_command(sys.argv[1:] if arguments is None else arguments))
    try:
        _run(options)
        sys.stdout.flush()
    except FedtuneError as error:
        sys.stderr.write(f"fedtune: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    """Call one command; each is imported when it is called, because torch, Hydra and the accountants take seconds."""
    match options.command:
        case "simulate":
            from fedtune.cli.simulate import simulate

            simulate(options.overrides, multirun=options.multirun)
        case "plan":
            from fedtune.cli.plan import plan

            plan(options)
        case "evaluate":
            from fedtune.cli.evaluate import evaluate

            evaluate(options.run, data_file=options.data, device=options.device)
        case "audit":
            from fedtune.cli.audit_command import audit as audit_run

            audit_run(options.overrides)
        case "model-hash":
            model_hash.model_hash(options)
        case "ledger":
            ledger.run(options)
        case "report":
            report.run(options)
        case "watch":
            watch.watch(options)
        case "site":
            site.run(options)
        case "provision":
            provision.run(options)
        case "server":
            server.run(options)
        case "run":
            from fedtune.cli.run import run

            run(options)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; overrides may stand on both sides of flags, which argparse alone does not allow."""
    parser = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "overrides") or any(part.startswith("-") for part in rest):
        return parser.parse_args(arguments)
    options.overrides += rest
    return options


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedtune",
        description="Federated, differentially private fine-tuning with LoRA adapters.",
        epilog="fedtune COMMAND --help says more. Exit codes: 0 done, 2 wrong input, 3 refused, 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str = "") -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=help, description=description, formatter_class=raw)

    simulate = command("simulate", "run a federation on this machine", _SIMULATE)
    simulate.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of comma-separated values"
    )
    simulate.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    planning = command("plan", "what a run would cost, before any data is touched")
    if "plan" in arguments:  # only then, because it imports Hydra and the accountants
        from fedtune.cli import plan

        plan.add_arguments(planning)
    audit.add_arguments(command("audit", "attack a run on this machine, to test its guarantee", audit.DESCRIPTION))
    evaluate = command("evaluate", "score a saved adapter", _EVALUATE)
    evaluate.add_argument("run", metavar="RUN", help="a run folder, such as runs/tighter")
    evaluate.add_argument("--data", required=True, metavar="FILE", help=".jsonl or .csv, plain or .gz")
    evaluate.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to score (default: auto)"
    )
    model_hash.add_arguments(command("model-hash", "the hash that names a base model", model_hash.DESCRIPTION))
    ledger.add_arguments(command("ledger", "read a site's ledger: what was spent, what is left", ledger.DESCRIPTION))
    report.add_arguments(command("report", "the privacy report of a run or a ledger", report.DESCRIPTION))
    watch.add_arguments(command("watch", "follow a run in a browser", watch.DESCRIPTION))
    site.add_arguments(command("site", "a site: its policy, its keys, its process", site.DESCRIPTION))
    provision.add_arguments(command("provision", "make a federation of real sites", provision.DESCRIPTION))
    server.add_arguments(command("server", "a federation's server", server.DESCRIPTION))
    run_arguments.add_arguments(command("run", "run a federation over real sites", run_arguments.DESCRIPTION))
    return parser
