"""`python -m janusvln.serve MODEL --vggt_model_path VGGT --prompt structured`"""

from __future__ import annotations

from vggt_cache.requirements import TRAINER, require

require(TRAINER)

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from types import FrameType
from typing import NoReturn

from janusvln.data.dialogue import ACTIONS
from janusvln.inference import Navigator, Prompt
from janusvln.inference.navigator import FRAMES_SHOWN, MOST_TOKENS
from janusvln.serve.desk import Desk
from janusvln.serve.http import NavigationServer
from vggt_cache.errors import SettingsError, VggtCacheError
from vggt_cache.output import print_any_name

LOCAL = "127.0.0.1"
PORT = 8765
LIMITS = ("max_episodes", "max_steps", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; returns the exit code. A known error is one sentence."""
    print_any_name()
    given = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _serve(given)
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(given: argparse.Namespace) -> None:
    for name in LIMITS:
        if getattr(given, name) < 1:
            raise SettingsError(f"--{name} {getattr(given, name)}: give 1 or more")
    prompt = Prompt.read(given.prompt)
    with NavigationServer(given.host, given.port) as server:
        navigator = Navigator.load(
            given.model,
            given.vggt_model_path,
            prompt,
            device=given.device,
            frames_shown=given.frames_shown,
            max_new_tokens=given.max_new_tokens,
        )
        limits = {name: getattr(given, name) for name in LIMITS}
        with closing(Desk(navigator, **limits)) as desk:
            if given.host not in (LOCAL, "localhost"):
                print(
                    f"[WARN] everybody who reaches {given.host} can use this server: nobody is asked who they are"
                )
            print(f"[INFO] {given.model} listens on http://{given.host}:{server.server_port}", flush=True)
            server.serve(desk, {"model": given.model, "context": navigator.context, "actions": ACTIONS})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m janusvln.serve",
        description="Let a simulator under another Python ask a trained model; janusvln/client.py is its side.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a model trained here, or a released JanusVLN")
    parser.add_argument(
        "--vggt_model_path", required=True, help="the VGGT that its features were computed with"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        help="what it was trained on: `structured`, or a file with the question's text",
    )
    parser.add_argument("--host", default=LOCAL, help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=PORT, help="%(default)s; 0: any that is free")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--frames_shown", type=int, default=FRAMES_SHOWN, help="in a prompt (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=MOST_TOKENS, help="of an answer (%(default)s)")
    parser.add_argument("--max_episodes", type=int, default=8, help="open at one time (%(default)s)")
    parser.add_argument("--max_steps", type=int, default=500, help="of an episode (%(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="waiting episodes that are answered together (%(default)s)"
    )
    return parser


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
