"""The command line: flags in, library calls, one sentence per error.

Every flag can be written with underscores, as in the guide, or with dashes. Modules that import torch are
loaded by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from vggt_cache import __version__
from vggt_cache.codec import CODECS
from vggt_cache.context import CONTEXTS
from vggt_cache.errors import SettingsError, VggtCacheError
from vggt_cache.flags import add_flags, default_text
from vggt_cache.identity import SETTINGS
from vggt_cache.monitor import MonitorSettings
from vggt_cache.output import print_any_name
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.precompute.stop import StoppedError

_CACHE_DIR = "cache directory, or the URL of one in a bucket (s3://, gs://, az://)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 fault found, 2 bad settings, 3 some inputs unusable)."""
    print_any_name()
    given = vars(build_parser().parse_args(argv))
    command = given.pop("command")
    try:
        return int(command(**given))
    except (VggtCacheError, StoppedError) as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail(
            "this process has no memory left: what is committed stays, and the same command goes on from there; give "
            "it more (ulimit -v, a container's limit), or use smaller --batch_size and --num_workers",
            1,
        )
    except RecursionError:
        return _fail(
            "something that was given is nested too deeply to be followed: check links and JSON files", 2
        )
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody left to tell
        return 1
    except OSError as error:  # such as too few descriptors, wherever the next one was needed
        where = f" at {error.filename}" if error.filename else ""
        return _fail(
            f"the operating system refuses to go on{where} ({error.strerror or error}): what is committed stays; check "
            "the path, its disk and mount, and the limit of open files (ulimit -n)",
            2,
        )
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT", 130)


def _fail(sentence: str, exit_code: int) -> int:
    print(f"[ERROR] {sentence}", file=sys.stderr, flush=True)
    return exit_code


class _Parser(argparse.ArgumentParser):
    """Flags are never abbreviated, and a wrong one is refused in one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\d[\d.,-]*$")  # `--layers -3,-1`: a value and no flag

    def flag(self, name: str, *short: str, help: str, default: Any = None, **options: Any) -> argparse.Action:
        """`--some_name`, which may also be written `--some-name`; `short` is a third spelling."""
        spellings = dict.fromkeys([*short, f"--{name}", f"--{name.replace('_', '-')}"])
        if default is not None:
            options["default"] = default
        return self.add_argument(*spellings, help=help + default_text(default), **options)

    def choice_of_spec(self) -> None:
        self.flag("context", choices=CONTEXTS, help="which cache is meant, where several share the directory")
        text = "the same, by the first digits of its fingerprint (vggt-cache info); VGGT_CACHE_FINGERPRINT sets it too"
        self.flag("fingerprint", help=text, default=_named_cache())

    def parse_known_args(self, *given: Any) -> Any:  # type: ignore[override]
        """A command's own parser answers for the flags after it: it knows what may have been meant."""
        found, unknown = super().parse_known_args(*given)
        known = {
            name.replace("-", "").replace("_", ""): name for name in reversed(self._option_string_actions)
        }
        for name in (one.partition("=")[0] for one in unknown if one.startswith("--")):
            if close := get_close_matches(name.replace("-", "").replace("_", ""), known, 1, 0.8):
                meant = known[close[0]]
                self.error(f"unrecognized arguments: {' '.join(unknown)} (did you mean {meant}?)")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"[ERROR] {message}; {self.prog} --help lists the flags\n")


def _named_cache() -> str | None:
    return os.environ.get("VGGT_CACHE_FINGERPRINT") or None


def build_parser() -> argparse.ArgumentParser:
    """Each command is a function that takes its arguments and flags by their names, and returns the exit code."""
    parser = _Parser(
        prog="vggt-cache", description="Features of a frozen VGGT encoder, computed once and read back."
    )
    parser.add_argument("--version", action="version", version=f"vggt-feature-cache {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_computing, _add_looking, _add_changing, _add_beside_a_cache):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], text: str, **directory: str) -> _Parser:
    """`directory`: the name of the command's one argument, and its help."""
    parser: _Parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    for argument, help in directory.items():
        parser.add_argument(argument, metavar="DIR", type=_named, help=help)
    return parser


def _named(path: str) -> str:
    """A path that names something: what is empty would be taken for the present directory."""
    if not path:
        raise argparse.ArgumentTypeError("is empty, as of a variable that is not set")
    return path


def _in(module: str, function: str) -> Callable[..., int]:
    """A function of a module that is not imported before it is called."""
    return lambda **given: getattr(import_module(f"vggt_cache.{module}"), function)(**given)


def _add_computing(commands: Any) -> None:
    text = (
        "Compute the features of all frames that the data names, once each, and store them. With --verify and "
        "without --vggt_model_path: only verify."
    )
    add_flags(_command(commands, "precompute", _precompute, text).flag, PrecomputeSettings)

    text = "Check every record, or with --data_root all that this data needs."
    verify = _command(commands, "verify", _in("inspection", "verify_cache"), text, cache_dir=_CACHE_DIR)
    verify.flag("data_root", help="check that every feature this data needs is present and intact")
    verify.choice_of_spec()
    only = {"annotation_path", "data_path", "layers", *SETTINGS} - {"context"}
    add_flags(verify.flag, PrecomputeSettings, only=only, defaults=False)
    verify.flag("num_workers", type=int, default=8, help="threads that read")


def _add_looking(commands: Any) -> None:
    text = "What a cache directory holds, by encoder specification."
    info = _command(commands, "info", _in("inspection", "show_info"), text, cache_dir=_CACHE_DIR)
    info.add_argument("--json", dest="as_json", action="store_true", help="as JSON")

    text = "Draw frames beside their features, colours by a joint PCA."
    view = _command(commands, "view", _in("inspection", "draw_view"), text, cache_dir=_CACHE_DIR)
    view.flag("data_root", help="the data whose frames are shown")
    add_flags(view.flag, PrecomputeSettings, only=("annotation_path", "data_path"), defaults=False)
    view.flag("output", "-o", default="features.png", help="picture to write, .png or .jpg")
    view.flag("count", type=int, default=8, help="how many features, spread over the data")
    view.choice_of_spec()


def _add_changing(commands: Any) -> None:
    text = "Remove what is provably unreachable. Without --yes only shows it."
    prune = _command(commands, "prune", _in("inspection", "prune_cache"), text, cache_dir=_CACHE_DIR)
    prune.flag(
        "damaged",
        action="store_true",
        help="also remove damaged records, so that precompute computes them again",
    )
    prune.flag(
        "spec",
        metavar="FINGERPRINT",
        help="remove one specification with all its features, by the first digits of its fingerprint (see info)",
    )
    prune.flag("yes", action="store_true", help="really remove")

    text = "Rewrite a store with another codec, each record checked first. Without --yes only shows it."
    convert = _command(commands, "convert", _in("inspection", "convert_cache"), text, cache_dir=_CACHE_DIR)
    convert.flag("codec", choices=CODECS, required=True, help="lossless: a third smaller; none: as they are")
    convert.choice_of_spec()
    convert.flag("yes", action="store_true", help="really convert")


def _add_beside_a_cache(commands: Any) -> None:
    text = "Examine a file system, or a bucket: is it fit to hold a cache?"
    _command(
        commands,
        "doctor",
        _doctor,
        text,
        directory="a directory on the mount in question, or a URL",
    )

    text = (
        "Copy features of a cache to a disk of this machine, up to a limit, where trainings look for them first "
        "(--vggt_cache_stage). May be stopped and run again, and by several processes at once."
    )
    stage = _command(commands, "stage", _in("staging", "stage_cache"), text, cache_dir=_CACHE_DIR)
    text = "directory on a disk of this machine"
    stage.add_argument("local_dir", metavar="LOCAL_DIR", type=_named, help=text)
    text = "of all that lies there, such as 2TB or 500GB (default: all but a tenth of its disk)"
    stage.flag("limit", metavar="SIZE", help=text)
    stage.flag("data_root", help="copy only what this data needs")
    add_flags(stage.flag, PrecomputeSettings, only=("annotation_path", "data_path"), defaults=False)
    stage.choice_of_spec()
    stage.flag("num_workers", type=int, default=8, help="threads that read")

    text = (
        "Make a checkpoint as it is read here from a pickle (.pt, .pth, .bin), loaded as weights alone, or from "
        "another checkpoint."
    )
    converter = _command(commands, "convert-checkpoint", _in("encoder.pickled", "convert_checkpoint"), text)
    text = "the pickle, of which nothing but tensors is loaded; or the directory of a checkpoint"
    converter.add_argument("source", metavar="FILE", type=_named, help=text)
    converter.add_argument(
        "directory", metavar="DIR", type=_named, help="where config.json and model.safetensors are written"
    )
    text = "round the weights, as the trainer does that will use them (default: as they are)"
    converter.flag("dtype", choices=("float32", "float16", "bfloat16"), help=text)

    text = "Make a small data set and encoder, and run every step on it."
    _command(commands, "demo", _in("demo.run", "run_demo"), text, directory="where to make it")

    text = "Watch a training run through its log: speed, loss, cache, time left, and what is wrong. Ctrl-C ends it."
    monitor = _command(commands, "monitor", _monitor, text)
    monitor.add_argument(
        "logs", metavar="LOG", nargs="+", help="log files, glob patterns, or directories with *.log and *.out"
    )
    add_flags(monitor.flag, MonitorSettings)


def _precompute(**given: Any) -> int:
    if not {"data_root", "annotation_path"} & given.keys():
        raise SettingsError(
            "--data_root is missing, so it is not known whose features are meant: give the folder of the data, or its "
            "files as --annotation_path"
        )
    if "vggt_model_path" in given:
        from vggt_cache.precompute.run import precompute

        return precompute(PrecomputeSettings(**given))
    if "verify" not in given or {"recompute", "dry_run"} & given.keys():
        raise SettingsError(
            "--vggt_model_path is missing, so there is no encoder to compute with: give a directory with "
            "config.json and model.safetensors, or the hub id facebook/VGGT-1B"
        )
    from vggt_cache.inspection import verify_cache

    unsaid = {"num_workers": PrecomputeSettings.num_workers, "fingerprint": _named_cache()}
    return verify_cache(**{**unsaid, **given})


def _doctor(directory: str) -> int:
    from vggt_cache.doctor import examine, format_findings

    findings = examine(directory)
    print(format_findings(findings))
    return int(any(finding.status == "fail" for finding in findings))


def _monitor(logs: list[str], **given: Any) -> int:
    from vggt_cache.monitor.run import monitor

    return monitor(MonitorSettings(logs=tuple(logs), **given))
