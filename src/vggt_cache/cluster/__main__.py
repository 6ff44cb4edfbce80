"""`python -m vggt_cache.cluster`: what the launchers in scripts/ ask before they start anything."""

from __future__ import annotations

from vggt_cache.requirements import CACHE, fault_of, require

require([])  # an old Python cannot even import what follows

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from vggt_cache.cluster.network import Rendezvous, free_port, interfaces
from vggt_cache.cluster.preflight import Launch, inspect
from vggt_cache.errors import SettingsError, VggtCacheError
from vggt_cache.output import print_any_name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 the nodes disagree, 2 a setting or path is wrong)."""
    print_any_name()
    settings = vars(_parser().parse_args(argv))
    command = settings.pop("command")
    try:
        return int(command(**settings))
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr, flush=True)
        # Whatever is wrong before a start is the user's to set right, a cache that cannot be read included.
        return 1 if command is _check and not isinstance(error, SettingsError) else 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vggt_cache.cluster", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def command(run: Callable[..., int], what: str, settings: type | None, *texts: str) -> Any:
        added = commands.add_parser(run.__name__[1:], help=what)
        added.set_defaults(command=run)
        for field in fields(settings) if settings else ():
            added.add_argument(f"--{field.name}", type=int if field.type == "int" else str, required=True)
        for name in texts:
            added.add_argument(f"--{name}", default="")
        return added

    command(_preflight, "is this node ready? says what will be done", Launch)
    command(_port, "print a free TCP port", None)
    command(_rendezvous, "check the meeting point; prints the interfaces to use", Rendezvous, "nccl", "gloo")
    places = ("cache_dir", "data_root", "annotation_path", "data_path", "output_dir")
    check = command(_check, "compare all nodes", Rendezvous, *places)
    check.add_argument("--count_samples", action="store_true")
    check.add_argument("--timeout_s", type=int, required=True)
    return parser


def _preflight(**launch: Any) -> int:
    for line in inspect(Launch(**launch)):
        print(f"[INFO] {line}", flush=True)
    return 0


def _port() -> int:
    print(free_port())
    return 0


def _rendezvous(nccl: str, gloo: str, **place: Any) -> int:
    checked = _checked(place)
    if checked.nodes > 1:
        for name, value in interfaces(checked.master_addr, nccl, gloo).items():
            print(f"{name}={value}")
    return 0


def _check(timeout_s: int, **settings: Any) -> int:
    if fault := fault_of(CACHE):
        raise SettingsError(fault)
    # torch is loaded here and not above: the other commands answer at once without it.
    from vggt_cache.cluster.check import Places, check_cluster
    from vggt_cache.doctor.findings import format_findings

    places = Places(**{field.name: settings.pop(field.name) for field in fields(Places)})
    place = _checked(settings)
    findings = check_cluster(place, places, timeout_s=timeout_s)
    print(format_findings(findings), flush=True)
    return int(any(finding.status == "fail" for finding in findings))


def _checked(settings: dict[str, Any]) -> Rendezvous:
    place = Rendezvous(**settings)
    for remark in place.check():
        print(f"[WARN] {remark}", file=sys.stderr, flush=True)
    return place


if __name__ == "__main__":
    raise SystemExit(main())
