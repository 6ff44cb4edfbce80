"""The command line: flags in, library calls, one sentence per error.

Every flag can be written with underscores, as in the guide, or with dashes. Modules that import torch are
loaded by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vggt_cache import __version__
from vggt_cache.codec import CODECS
from vggt_cache.context import CONTEXTS
from vggt_cache.errors import SettingsError, VggtCacheError
from vggt_cache.flags import add_flags, default_text
from vggt_cache.output import print_any_name
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.precompute.stop import StoppedError

_OF_A_CACHE = ("image_size", "resize_mode", "alpha", "layer", "feature_dtype", "compute_dtype")
"""Settings that are part of a cache's specification, beside its context."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 fault found, 2 bad settings, 3 some inputs unusable)."""
    print_any_name()
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except (VggtCacheError, StoppedError) as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail(
            "this process has no memory left: what is committed stays, and the same command goes on from there; give "
            "it more (ulimit -v, a container's limit), or use smaller --batch_size and --num_workers",
            1,
        )
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody left to tell
        return 1
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT", 130)


def _fail(sentence: str, exit_code: int) -> int:
    print(f"[ERROR] {sentence}", file=sys.stderr, flush=True)
    return exit_code


# ---------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    """Flags are never abbreviated, and a wrong one is refused in one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def flag(self, name: str, *short: str, help: str, default: Any = None, **options: Any) -> argparse.Action:
        """`--some_name`, which may also be written `--some-name`; `short` is a third spelling."""
        spellings = dict.fromkeys([*short, f"--{name}", f"--{name.replace('_', '-')}"])
        if default is not None:
            options["default"] = default
        return self.add_argument(*spellings, help=help + default_text(default), **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"[ERROR] {message}; {self.prog} --help lists the flags\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vggt-cache", description="Features of a frozen VGGT encoder, computed once and read back."
    )
    parser.add_argument("--version", action="version", version=f"vggt-feature-cache {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_precompute, _add_verify, _add_info, _add_view, _add_prune, _add_convert):
        add(commands)
    for add in (_add_doctor, _add_demo, _add_monitor):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
    parser: _Parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    return parser


def _add_precompute(commands: Any) -> None:
    parser = _command(
        commands,
        "precompute",
        _precompute,
        "Compute the features of all frames that the data names, once each, and store them. With --verify and "
        "without --vggt_model_path: only verify.",
    )
    add_flags(parser.flag, PrecomputeSettings)


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands, "verify", _verify, "Check every record, or with --data_root all that this data needs."
    )
    parser.add_argument("cache_dir", metavar="DIR", help="cache directory")
    parser.flag("data_root", help="check that every feature this data needs is present and intact")
    _add_choice_of_spec(parser)
    add_flags(parser.flag, PrecomputeSettings, only=_OF_A_CACHE, defaults=False)
    parser.flag("num_workers", type=int, default=8, help="threads that read")


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", _info, "What a cache directory holds, by encoder specification.")
    parser.add_argument("cache_dir", metavar="DIR", help="cache directory")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_view(commands: Any) -> None:
    parser = _command(commands, "view", _view, "Draw frames beside their features, colours by a joint PCA.")
    parser.add_argument("cache_dir", metavar="DIR", help="cache directory")
    parser.flag("data_root", required=True, help="the data whose frames are shown")
    parser.flag("output", "-o", default="features.png", help="PNG to write")
    parser.flag("count", type=int, default=8, help="how many features, spread over the data")
    _add_choice_of_spec(parser)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands, "prune", _prune, "Remove what is provably unreachable. Without --yes only shows it."
    )
    parser.add_argument("cache_dir", metavar="DIR", help="cache directory")
    parser.flag(
        "damaged",
        action="store_true",
        help="also remove damaged records, so that precompute computes them again",
    )
    parser.flag("yes", action="store_true", help="really remove")


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "Rewrite a store's shards with another codec, each record checked first. Without --yes only shows it.",
    )
    parser.add_argument("cache_dir", metavar="DIR", help="cache directory")
    parser.flag("codec", choices=CODECS, required=True, help="lossless: a third smaller; none: as they are")
    _add_choice_of_spec(parser)
    parser.flag("yes", action="store_true", help="really convert")


def _add_doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", _doctor, "Examine a file system: is it fit to hold a cache?")
    parser.add_argument("directory", metavar="DIR", help="a directory on the mount in question")


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", _demo, "Make a small data set and encoder, and run every step on it.")
    parser.add_argument("directory", metavar="DIR", help="where to make it")


def _add_monitor(commands: Any) -> None:
    parser = _command(
        commands,
        "monitor",
        _monitor,
        "Watch a training run through its log: speed, loss, cache, time left, and what is wrong. Ctrl-C ends it.",
    )
    parser.add_argument(
        "logs", metavar="LOG", nargs="+", help="log files, glob patterns, or directories with *.log and *.out"
    )
    parser.flag(
        "once", action="store_true", help="say what there is now and stop; 1 where something is wrong"
    )
    parser.flag("json", action="store_true", help="one JSON object on a line each time it reads the log")
    parser.flag("interval", type=float, default=5.0, metavar="S", help="seconds between two looks")
    parser.flag(
        "stall_s",
        type=float,
        metavar="S",
        help="warn when no step has come for so long; the larger of 5 x s/it and 120 s where not given",
    )
    parser.flag(
        "hit_rate_drop", type=float, default=0.05, metavar="SHARE", help="warn when the hit rate fell by more"
    )
    parser.flag(
        "samples_per_step", type=int, metavar="N", help="for samples/s, where the log does not say it"
    )


def _add_choice_of_spec(parser: _Parser) -> None:
    parser.flag("context", choices=CONTEXTS, help="which cache is meant, where several share the directory")
    parser.flag("fingerprint", help="the same, by the first digits of its fingerprint (see vggt-cache info)")


# ---------------------------------------------------------------- commands


def _precompute(arguments: argparse.Namespace) -> int:
    given = _given(arguments)
    if "vggt_model_path" in given:
        from vggt_cache.precompute.run import precompute

        return precompute(PrecomputeSettings(**given))
    if "verify" not in given or {"recompute", "dry_run"} & given.keys():
        raise SettingsError(
            "--vggt_model_path is missing, so there is no encoder to compute with: give a directory with "
            "config.json and model.safetensors, or the hub id facebook/VGGT-1B"
        )
    return _verify_what_is_given({"num_workers": PrecomputeSettings.num_workers, **given})


def _verify(arguments: argparse.Namespace) -> int:
    return _verify_what_is_given(_given(arguments))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of a command; of those that were made from settings, the ones that the user gave."""
    return {name: value for name, value in vars(arguments).items() if name != "command"}


def _verify_what_is_given(given: dict[str, Any]) -> int:
    from vggt_cache.inspection import verify_against_data, verify_store

    which = {name: given.get(name) for name in ("context", "fingerprint")}
    threads = max(1, given["num_workers"])
    if given.get("data_root") is None:
        return verify_store(given["cache_dir"], **which, threads=threads, asked=given)
    return verify_against_data(
        given["cache_dir"],
        given["data_root"],
        **which,
        max_samples=given.get("max_samples", PrecomputeSettings.max_samples),
        threads=threads,
        asked=given,
    )


def _info(arguments: argparse.Namespace) -> int:
    from vggt_cache.inspection import show_info

    return show_info(arguments.cache_dir, as_json=arguments.json)


def _view(arguments: argparse.Namespace) -> int:
    from vggt_cache.inspection import draw_view

    return draw_view(
        arguments.cache_dir,
        arguments.data_root,
        arguments.output,
        count=arguments.count,
        context=arguments.context,
        fingerprint=arguments.fingerprint,
    )


def _prune(arguments: argparse.Namespace) -> int:
    from vggt_cache.inspection import prune_cache

    return prune_cache(arguments.cache_dir, damaged=arguments.damaged, really=arguments.yes)


def _convert(arguments: argparse.Namespace) -> int:
    from vggt_cache.inspection import convert_cache

    return convert_cache(
        arguments.cache_dir,
        arguments.codec,
        context=arguments.context,
        fingerprint=arguments.fingerprint,
        really=arguments.yes,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from vggt_cache.doctor import examine, format_findings

    findings = examine(arguments.directory)
    print(format_findings(findings))
    return int(any(finding.status == "fail" for finding in findings))


def _monitor(arguments: argparse.Namespace) -> int:
    from vggt_cache.monitor import MonitorSettings, monitor

    return monitor(MonitorSettings(**{**_given(arguments), "logs": tuple(arguments.logs)}))


def _demo(arguments: argparse.Namespace) -> int:
    from vggt_cache.demo.run import run_demo

    return run_demo(arguments.directory)
