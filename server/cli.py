"""The command `trimtab`. Imports the engine only for the command that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from calibrators import registry
from server import __version__, catalogue, models
from server.evaluation import flags
from server.overhead.flags import add_bench
from server.profiling.flags import add_profile
from server.settings import add_calibrators


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        # vLLM parses this command itself; its parser takes seconds to import.
        from server import serve

        return serve.main(argv[1:])
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab",
        description="OpenAI-compatible server around vLLM with attention calibration per request.",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "serve", help="serve a model: trimtab serve [MODEL] [any flag of vllm serve]"
    )
    _add_models(commands)
    listing = commands.add_parser(
        "calibrators", help="list the calibrators on offer and their parameters"
    )
    add_calibrators(listing.add_argument)
    listing.set_defaults(run=_calibrators)
    doctor = commands.add_parser("doctor", help="check that calibration works")
    doctor.add_argument("--url", help="a running server; without it one is started and stopped")
    doctor.add_argument("--api-key", help="key of that server")
    doctor.set_defaults(run=_doctor)
    flags.add_eval(commands).set_defaults(run=_eval)
    add_bench(commands).set_defaults(run=_bench)
    add_profile(commands, _profile)
    return parser


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("models", help="list or prepare embedded models")
    parser.set_defaults(run=_list_models)
    actions = parser.add_subparsers(metavar="ACTION")
    prepare = actions.add_parser("prepare", help="convert a model if needed, print its folder")
    prepare.add_argument("name", help="name of an embedded model")
    prepare.set_defaults(run=_prepare_model)


def _list_models(_: argparse.Namespace) -> int:
    for name, model in models.EMBEDDED.items():
        folder = models.is_prepared(name)
        print(f"{name}  {model.title}, {model.licence}  {folder or 'not prepared'}")
    return 0


def _prepare_model(args: argparse.Namespace) -> int:
    try:
        folder = models.prepare(args.name, report=lambda line: print(line, flush=True))
    except models.ModelError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


def _calibrators(args: argparse.Namespace) -> int:
    try:
        offer = registry.load(args.calibrators)
    except registry.RegistryError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 2
    others = [name for name in registry.installed() if name not in offer]
    print(catalogue.table(list(offer.values())) or "no calibrator is on offer")
    if others:
        print(f"\ninstalled, but not on offer without --calibrators: {', '.join(others)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from server import doctor

    return doctor.main(args.url, args.api_key)


def _eval(args: argparse.Namespace) -> int:
    from server.evaluation import command

    return command.main(args)


def _bench(args: argparse.Namespace) -> int:
    from server.overhead import command

    return command.main(args)


def _profile(args: argparse.Namespace) -> int:
    from server.profiling import command

    return command.main(args)


if __name__ == "__main__":
    sys.exit(main())
