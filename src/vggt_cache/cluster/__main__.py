"""`python -m vggt_cache.cluster`: what the launchers in scripts/ ask before they start anything."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TypeVar

from vggt_cache.cluster import network
from vggt_cache.cluster.preflight import Launch, inspect
from vggt_cache.cluster.rendezvous import Rendezvous, interfaces
from vggt_cache.errors import SettingsError, VggtCacheError
from vggt_cache.output import print_any_name

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 the nodes disagree, 2 a setting or path is wrong)."""
    print_any_name()
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr, flush=True)
        # Whatever is wrong before a start is the user's to set right, a cache that cannot be read included.
        return 1 if arguments.command is _check and not isinstance(error, SettingsError) else 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vggt_cache.cluster", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[..., int], what: str, flags: type | None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what)
        added.set_defaults(command=run)
        for field in fields(flags) if flags else ():
            added.add_argument(f"--{field.name}", type=int if field.type == "int" else str, required=True)
        return added

    command("preflight", _preflight, "is this node ready? says what will be done", Launch)
    command("port", _port, "print a free TCP port", None)
    meeting = command(
        "rendezvous", _rendezvous, "check the meeting point; prints the interfaces to use", Rendezvous
    )
    meeting.add_argument("--nccl", default="")
    meeting.add_argument("--gloo", default="")
    check = command("check", _check, "compare all nodes", Rendezvous)
    for name in ("cache_dir", "data_root", "output_dir"):
        check.add_argument(f"--{name}", default="")
    check.add_argument("--count_samples", action="store_true")
    check.add_argument("--timeout_s", type=int, required=True)
    return parser


def _made(settings: type[T], arguments: argparse.Namespace) -> T:
    return settings(**{field.name: getattr(arguments, field.name) for field in fields(settings)})  # type: ignore[arg-type]


def _checked_place(arguments: argparse.Namespace) -> Rendezvous:
    place = _made(Rendezvous, arguments)
    for remark in place.check():
        print(f"[WARN] {remark}", file=sys.stderr, flush=True)
    return place


def _preflight(arguments: argparse.Namespace) -> int:
    for line in inspect(_made(Launch, arguments)):
        print(f"[INFO] {line}", flush=True)
    return 0


def _port(arguments: argparse.Namespace) -> int:
    print(network.free_port())
    return 0


def _rendezvous(arguments: argparse.Namespace) -> int:
    place = _checked_place(arguments)
    if place.nodes > 1:
        for name, value in interfaces(place.master_addr, arguments.nccl, arguments.gloo).items():
            print(f"{name}={value}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    # torch is loaded here and not above: the other commands answer at once without it.
    from vggt_cache.cluster.check import check_cluster
    from vggt_cache.cluster.facts import Places
    from vggt_cache.doctor.findings import format_findings

    place = _checked_place(arguments)
    findings = check_cluster(place, _made(Places, arguments), timeout_s=arguments.timeout_s)
    print(format_findings(findings), flush=True)
    return int(any(finding.status == "fail" for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
