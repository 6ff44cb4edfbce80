"""The local server: its answers are the class's, what it refuses it says in a sentence, and it is bounded."""

from __future__ import annotations

import ast
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from evaluation_kit import PROMPT, make_frames, write_trained
from janusvln.client import NavigationClient, NavigationError
from janusvln.inference import Answer, Navigator, Prompt
from janusvln.serve import desk as desk_module
from janusvln.serve.__main__ import main
from janusvln.serve.desk import Desk
from janusvln.serve.http import NavigationServer
from vggt_cache.errors import FrameError

CLIENT = Path(__file__).resolve().parent.parent / "src" / "janusvln" / "client.py"
INSTRUCTION = "walk to the door"
LIMITS = {"max_episodes": 3, "max_steps": 4}


@pytest.fixture(scope="module")
def trained(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained(tmp_path_factory.mktemp("trained"), small_checkpoint, lam=2.0)


@pytest.fixture(scope="module")
def navigator(trained: Path, small_checkpoint: Path) -> Navigator:
    return Navigator.load(
        str(trained), str(small_checkpoint), Prompt(text=PROMPT), device="cpu", max_new_tokens=4
    )


@pytest.fixture
def server(navigator: Navigator) -> Iterator[NavigationServer]:
    yield from serving(Desk(navigator, batch_size=2, **LIMITS))


def serving(desk: Desk) -> Iterator[NavigationServer]:
    with NavigationServer("127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve, args=(desk, {"model": "tiny"}))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    desk.close()


@pytest.fixture
def client(server: NavigationServer) -> Iterator[NavigationClient]:
    with NavigationClient(port=server.server_port, timeout_s=60) as client:
        yield client


def ask(server: NavigationServer, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def expected(navigator: Navigator, frames: list[npt.NDArray[np.uint8]]) -> list[Answer]:
    episode = navigator.start(INSTRUCTION)
    return [navigator.act(episode, frame) for frame in frames]


def fields(answers: list[Answer]) -> list[dict[str, Any]]:
    return [
        {"text": one.text, "action": one.action, "complete": one.complete, "step": step}
        for step, one in enumerate(answers)
    ]


def test_the_servers_answers_are_those_of_the_class(navigator: Navigator, client: NavigationClient) -> None:
    frames = make_frames(4)
    answers = fields(expected(navigator, frames))
    assert len({answer["text"] for answer in answers}) > 1
    for _ in range(2):  # the second episode knows nothing of the first
        client.start(INSTRUCTION)
        assert [client.act(frame) for frame in frames] == answers
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, "PNG")
    client.start(INSTRUCTION)
    assert client.act(file.getvalue()) == answers[0]


def test_several_simulators_at_once_are_answered_as_one(
    navigator: Navigator, server: NavigationServer
) -> None:
    walks = [make_frames(3, seed) for seed in range(3)]
    answers = [fields(expected(navigator, walk)) for walk in walks]

    def walk(frames: list[npt.NDArray[np.uint8]]) -> list[dict[str, Any]]:
        with NavigationClient(port=server.server_port, timeout_s=60) as client:
            client.start(INSTRUCTION)
            return [client.act(frame) for frame in frames]

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(walk, walks)) == answers


def test_a_frame_that_is_sent_again_is_seen_once(navigator: Navigator, server: NavigationServer) -> None:
    """As a client does whose connection broke before the answer came."""
    frames = make_frames(2)
    answers = fields(expected(navigator, frames))
    _, begun = ask(server, "POST", "/episodes", json.dumps({"instruction": INSTRUCTION}).encode())
    for step in (0, 0, 1, 1):
        path = f"/episodes/{begun['episode']}/{step}?height=48&width=64"
        assert ask(server, "POST", path, frames[step].tobytes()) == (200, answers[step])
    path = f"/episodes/{begun['episode']}/1?height=48&width=64"
    status, said = ask(server, "POST", path, frames[0].tobytes())
    assert (status, "step 1 was sent, and the episode's next step is 2" in said["error"]) == (409, True)


def test_what_cannot_be_done_is_said_in_a_sentence_and_the_server_goes_on(
    navigator: Navigator, server: NavigationServer, client: NavigationClient
) -> None:
    _, begun = ask(server, "POST", "/episodes", json.dumps({"instruction": INSTRUCTION}).encode())
    here = f"/episodes/{begun['episode']}"
    frame = make_frames(1)[0]
    too_long = json.dumps({"instruction": "x" * 70_000}).encode()
    refused: list[tuple[int, str, tuple[str, str, bytes | None]]] = [
        (404, "is nothing that this server does", ("GET", "/episodes", None)),
        (404, "is nothing that this server does", ("POST", f"{here}/x", b"")),
        (404, "there is no episode 'ffffffffffffffff'", ("POST", f"/episodes/{'f' * 16}/0", b"x")),
        (404, "there is no episode", ("DELETE", f"/episodes/{'f' * 16}", None)),
        (400, "the body is not", ("POST", "/episodes", b"no json")),
        (400, "the body is not", ("POST", "/episodes", b'{"instruction": 7}')),
        (400, "in at most 65536 bytes", ("POST", "/episodes", too_long)),
        (400, "the instruction has <image> in it", ("POST", "/episodes", b'{"instruction": "<image>"}')),
        (400, "it is no image in a format", ("POST", f"{here}/0", b"no image")),
        (400, "not both given as numbers", ("POST", f"{here}/0?width=64", frame.tobytes())),
        (400, "9216 bytes are not 64 x 47 pixels", ("POST", f"{here}/0?width=64&height=47", frame.tobytes())),
        (409, "step 1 was sent, and the episode's next step is 0", ("POST", f"{here}/1", b"x")),
    ]
    for status, sentence, request in refused:
        got, said = ask(server, *request)
        assert (got, sentence in said["error"]) == (status, True), (request[:2], said)
    assert ask(server, "GET", "/", Origin="http://elsewhere")[0] == 403
    assert ask(server, "POST", "/episodes", **{"Content-Length": str(2**40)})[0] == 413
    assert client.about() == {"model": "tiny", **LIMITS}
    client.start(INSTRUCTION)
    assert [client.act(frame)] == fields(expected(navigator, [frame]))


def test_episodes_and_their_steps_are_bounded_and_idle_ones_make_room(
    server: NavigationServer, client: NavigationClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.start(INSTRUCTION)
    for frame in make_frames(4):
        client.act(frame)
    with pytest.raises(NavigationError, match="has 4 steps, which is the limit"):
        client.act(make_frames(1)[0])
    others = [NavigationClient(port=server.server_port) for _ in range(3)]
    for other in others[:2]:
        other.start(INSTRUCTION)
    with pytest.raises(NavigationError, match="3 episodes are open, which is the limit"):
        others[2].start(INSTRUCTION)
    client.end()
    others[2].start(INSTRUCTION)
    monkeypatch.setattr(desk_module, "IDLE_S", 0.0)
    client.start(INSTRUCTION)
    with pytest.raises(NavigationError, match="there is no episode"):
        others[0].act(make_frames(1)[0])
    for other in others:
        other.close()


def test_a_fault_of_the_model_is_told_and_the_frame_may_be_sent_again(
    navigator: Navigator, client: NavigationClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make_frames(2)
    answers = fields(expected(navigator, frames))
    client.start(INSTRUCTION)
    with monkeypatch.context() as patch:
        patch.setattr(navigator, "answer", lambda episodes: 1 / 0)
        with pytest.raises(NavigationError, match=r"the server failed \(ZeroDivisionError"):
            client.act(frames[0])
    assert [client.act(frame) for frame in frames] == answers


def test_the_fault_of_one_episode_is_not_that_of_those_answered_with_it(navigator: Navigator) -> None:
    desk = Desk(navigator, batch_size=2)
    good, bad = (desk_module._Job(episode=navigator.start(INSTRUCTION), frame=None) for _ in range(2))
    good.episode.see(make_frames(1)[0])
    desk._answer([good, bad])
    assert good.answer.result() == navigator.answer([good.episode])[0]
    with pytest.raises(FrameError, match="has seen no frame yet"):
        bad.answer.result()
    desk.close()


def test_the_client_is_one_file_of_the_standard_library_for_old_pythons(tmp_path: Path) -> None:
    tree = ast.parse(CLIENT.read_text(), feature_version=(3, 8))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        )
    }
    assert imported <= sys.stdlib_module_names
    (tmp_path / "client.py").write_bytes(CLIENT.read_bytes())
    code = "import client; client.NavigationClient(port=1).start('x')"
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path[:0] = ['.']; {code}"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert "http://127.0.0.1:1 cannot be reached or does not answer" in done.stderr


def test_the_command_serves_this_machine_until_it_is_stopped(
    navigator: Navigator, trained: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    command = [sys.executable, "-m", "janusvln.serve", trained, "--vggt_model_path", small_checkpoint]
    command += [
        "--prompt",
        tmp_path / "prompt.txt",
        "--port",
        "0",
        "--device",
        "cpu",
        "--max_new_tokens",
        "4",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "listens on" in line)
        assert f"{trained} listens on http://127.0.0.1:" in line
        with NavigationClient(port=int(line.rpartition(":")[2])) as client:
            client.start(INSTRUCTION)
            frames = make_frames(2)
            assert [client.act(frame) for frame in frames] == fields(expected(navigator, frames))
        os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_command_refuses_in_one_sentence(
    trained: Path, small_checkpoint: Path, server: NavigationServer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [str(trained), "--vggt_model_path", str(small_checkpoint), "--device", "cpu"]
    cases = [
        ([*model, "--prompt", "structured", "--port", str(server.server_port)], 2, "cannot be listened on"),
        ([*model, "--prompt", "structured", "--max_steps", "0"], 2, "--max_steps 0: give 1 or more"),
        ([*model, "--prompt", "/nowhere"], 2, "--prompt /nowhere"),
        (["/nowhere", *model[1:], "--prompt", "structured"], 2, "/nowhere is no directory"),
    ]
    for arguments, code, sentence in cases:
        capsys.readouterr()
        assert main(arguments) == code, arguments
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[ERROR]")]
        assert len(errors) == 1
        assert sentence in errors[0]
