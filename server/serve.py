"""`trimtab serve`: vLLM's serve command with calibration switched on."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from calibrators import registry
from server import __version__, keys, models
from server.engine import startup
from server.engine.ending import EngineDied
from server.engine.media import MAX_IMAGES, set_defaults
from server.engine.payload import KEY
from server.offer import offer
from server.settings import Settings, add_flags, share_salt_key

SHUTDOWN_SECONDS = 45
# Tokens of prompts that wait or are being computed: hours of work for a CPU, minutes for a GPU.
QUEUED_TOKENS = 1 << 20
# When a worker has died, vLLM gives the others this long to notice, and four seconds more, before
# it tells those who wait for an answer. They hang in an exchange with the one that is gone.
WORKER_SECONDS = 2
# vLLM's 4 MB are for no client that means well.
HEADER_BYTES = 32 * 1024
REFUSALS = (
    startup.StartupRefused,
    registry.RegistryError,
    models.ModelError,
    keys.KeyFileError,
)
# The embedded models are small; without a figure vLLM would take nearly all memory for keys
# and values.
EMBEDDED_KV_CACHE_BYTES = 2 << 30


def serve(argv: Sequence[str], report: Callable[[str], None]) -> None:
    """Parse, check and run until the server ends.

    Raises:
        StartupRefused: the configuration cannot be calibrated.
        RegistryError: a calibrator cannot be offered.
        ModelError: an embedded model cannot be prepared.
        KeyFileError: the file of API keys cannot be used.
    """
    args = checked(argv, report)
    ServeSubcommand().cmd(args)


def checked(argv: Sequence[str], report: Callable[[str], None]) -> Namespace:
    """Arguments of a server that can calibrate; nothing runs yet.

    Raises:
        StartupRefused, RegistryError, ModelError, KeyFileError: as `serve` does.
    """
    cli_env_setup()
    args = parse(with_model(argv))
    settings = Settings.from_args(args)
    registry.load(settings.calibrators)
    keys.configured(args, settings)
    startup.check_version(allow_untested=settings.allow_untested_vllm)
    startup.check_arguments(args)
    resolve_model(args, report)
    switch_on(args, settings)
    ServeSubcommand().validate(args)
    configure_logging_from_args(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    startup.check_config(config, allow_untested=settings.allow_untested_vllm)
    bound_queue(args, config.scheduler_config.max_num_seqs + settings.limits.max_queued_requests)
    # Each front end reads profiles and presets again; what is wrong with them is said here, before
    # a model is loaded.
    offer(config, settings, args.served_model_name or [args.model])
    return args


def with_model(argv: Sequence[str]) -> list[str]:
    """The arguments, with the default model named where vLLM's parser insists on a name.

    It does so beside `--served-model-name`, and for a `--config` file that names no model.
    """
    flags = {arg.split("=")[0].replace("_", "-") for arg in argv}
    named = "--model" in flags or not argv or not argv[0].startswith("-")
    insists = "--served-model-name" in flags or _config_without_model(argv)
    return [models.DEFAULT_MODEL, *argv] if insists and not named else [*argv]


def _config_without_model(argv: Sequence[str]) -> bool:
    if "--config" not in argv[:-1]:
        return False
    config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
    return isinstance(config, dict) and "model" not in config


def parse(argv: Sequence[str]) -> Namespace:
    """Arguments of `vllm serve`, ours beside them, with Trimtab's defaults."""
    parser = FlexibleArgumentParser(prog="trimtab")
    commands = parser.add_subparsers(dest="subparser", required=True)
    serve_parser = ServeSubcommand().subparser_init(commands)
    serve_parser.usage = "trimtab serve [MODEL] [options]"
    add_flags(serve_parser)
    serve_parser.set_defaults(
        model=models.DEFAULT_MODEL,
        shutdown_timeout=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        limit_mm_per_prompt={"image": MAX_IMAGES},
    )
    if current_platform.is_cpu():
        # Compiling takes a minute and gains a tenth; see docs/decisions.md.
        serve_parser.set_defaults(enforce_eager=True)
    args: Namespace = parser.parse_args(["serve", *argv])
    return args


def resolve_model(args: Namespace, report: Callable[[str], None]) -> None:
    """Turn the name of an embedded model into its folder, and serve it under its name."""
    name = args.model = args.model_tag or args.model
    if name not in models.EMBEDDED:
        return
    args.model_tag = args.model = str(models.prepare(name, report=report))
    args.served_model_name = args.served_model_name or [name]
    if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = EMBEDDED_KV_CACHE_BYTES


def switch_on(args: Namespace, settings: Settings) -> None:
    """Have vLLM load our worker, scheduler and routes.

    The entry in `additional_config` tells workers which calibrators are on offer, and makes
    vLLM's compile cache depend on our version.
    """
    if args.worker_cls == "auto":
        args.worker_cls = startup.worker_class()
    if args.scheduler_cls is None:
        args.scheduler_cls = startup.SCHEDULER
    args.additional_config = {
        **(args.additional_config or {}),
        KEY: {"version": __version__, "calibrators": list(settings.calibrators)},
    }
    plugins = os.environ.get("VLLM_PLUGINS")
    # Endpoint plug-ins load only when named. Naming ours must not shut out general plug-ins
    # that vLLM loads when nothing is named.
    names = plugins.split(",") if plugins is not None else _general_plugins()
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "trimtab"]))
    share_salt_key()
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", str(WORKER_SECONDS))
    set_defaults(os.environ)


def bound_queue(args: Namespace, capacity: int) -> None:
    """Have vLLM count what it has in hand, sequence by sequence, over all API servers."""
    if args.max_num_queued_reqs is None:
        args.max_num_queued_reqs = capacity
    if args.max_num_queued_tokens is None:
        args.max_num_queued_tokens = QUEUED_TOKENS


def _general_plugins() -> list[str]:
    from importlib.metadata import entry_points

    groups = [group for group in entry_points().groups if group.startswith("vllm.")]
    return [
        entry.name
        for group in groups
        if group != "vllm.endpoint_plugins"
        for entry in entry_points(group=group)
    ]


def main(argv: Sequence[str]) -> int:
    """Run; a refusal is one line and exit status 2, an engine that died exit status 1."""
    try:
        serve(argv, lambda line: print(line, file=sys.stderr, flush=True))
    except REFUSALS as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 2
    except EngineDied as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 1
    return 0
