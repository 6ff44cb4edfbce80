"""`python -m vggt_cache.cluster`: what the launchers in scripts/ ask before they start anything."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from vggt_cache.cluster import network
from vggt_cache.cluster.preflight import Plan, inspect
from vggt_cache.cluster.rendezvous import Rendezvous, interfaces
from vggt_cache.errors import SettingsError, VggtCacheError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 the nodes disagree, 2 a setting or path is wrong)."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr, flush=True)
        # Whatever is wrong before a start is the user's to set right, a cache that cannot be read included.
        return 1 if arguments.name == "check" and not isinstance(error, SettingsError) else 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vggt_cache.cluster", allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True)
    preflight = commands.add_parser("preflight", help="is this node ready? says what will be done")
    for field in fields(Plan):
        numeric = field.type == "int"
        preflight.add_argument(f"--{field.name}", type=int if numeric else str, required=True)
    preflight.set_defaults(command=_preflight)
    rendezvous = commands.add_parser(
        "rendezvous", help="check the meeting point; prints the interfaces to use"
    )
    rendezvous.set_defaults(command=_rendezvous)
    check = commands.add_parser("check", help="compare all nodes")
    check.set_defaults(command=_check)
    for command in (rendezvous, check):
        _meeting_flags(command)
    port = commands.add_parser("port", help="print a free TCP port")
    port.set_defaults(command=_port)
    rendezvous.add_argument("--nccl", default="")
    rendezvous.add_argument("--gloo", default="")
    for name in ("cache_dir", "data_root", "output_dir"):
        check.add_argument(f"--{name}", default="")
    check.add_argument("--count_samples", action="store_true")
    check.add_argument("--timeout_s", type=int, required=True)
    return parser


def _meeting_flags(command: argparse.ArgumentParser) -> None:
    for name in ("nodes", "node_rank", "master_port"):
        command.add_argument(f"--{name}", type=int, required=True)
    command.add_argument("--master_addr", required=True)


def _place(arguments: argparse.Namespace) -> Rendezvous:
    return Rendezvous(**{field.name: getattr(arguments, field.name) for field in fields(Rendezvous)})


def _preflight(arguments: argparse.Namespace) -> int:
    plan = Plan(**{field.name: getattr(arguments, field.name) for field in fields(Plan)})
    for line in inspect(plan):
        print(f"[INFO] {line}", flush=True)
    return 0


def _rendezvous(arguments: argparse.Namespace) -> int:
    place = _place(arguments)
    _say_remarks(place)
    if place.nodes > 1:
        for name, value in interfaces(place.master_addr, arguments.nccl, arguments.gloo).items():
            print(f"{name}={value}")
    return 0


def _say_remarks(place: Rendezvous) -> None:
    for remark in place.check():
        print(f"[WARN] {remark}", file=sys.stderr, flush=True)


def _port(arguments: argparse.Namespace) -> int:
    print(network.free_port())
    return 0


def _check(arguments: argparse.Namespace) -> int:
    # torch is loaded here and not above: the other commands answer at once without it.
    from vggt_cache.cluster.check import check_cluster
    from vggt_cache.cluster.facts import Places
    from vggt_cache.doctor.findings import format_findings

    places = Places(**{field.name: getattr(arguments, field.name) for field in fields(Places)})
    place = _place(arguments)
    _say_remarks(place)
    findings = check_cluster(place, places, timeout_s=arguments.timeout_s)
    print(format_findings(findings), flush=True)
    return 1 if any(finding.status == "fail" for finding in findings) else 0


if __name__ == "__main__":
    raise SystemExit(main())
