"""One driver hands out all work: nothing is forgotten whoever is lost, and the result is that of one process.

There is no Ray here: the workers are the class that becomes an actor, called in this process.
"""

from __future__ import annotations

import copy
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_data import SIZE, write_annotations, write_dataset, write_episode
from trials.toy_encoder import ToyCheckpoint, toy_encoder
from vggt_cache import FeatureCache
from vggt_cache.cli import main
from vggt_cache.errors import CommitError, SettingsError, SmallFileError
from vggt_cache.precompute import engine as engine_module
from vggt_cache.precompute import ray_actor
from vggt_cache.precompute import run as run_module
from vggt_cache.precompute.driver import Driver, Event, Sayings
from vggt_cache.precompute.handout import MOST_ENDS, Handout
from vggt_cache.precompute.plan import Block, Task
from vggt_cache.precompute.ray_actor import EncodingProcess, Order
from vggt_cache.precompute.ray_crew import first_words
from vggt_cache.precompute.ray_engine import _connect, _kind_of_device, share_of_cores
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.precompute.todo import MOST_AHEAD
from vggt_cache.requirements import LOWEST

# ---------------------------------------------------------------- who gets what


def blocks_of(sizes: Iterable[int]) -> list[Block]:
    return [Block(block_id=f"{at}", features=np.arange(size)) for at, size in enumerate(sizes)]


@given(st.data())
@settings(max_examples=60)
def test_every_block_is_saved_or_given_up_whoever_is_lost(data) -> None:
    blocks = blocks_of(data.draw(st.lists(st.integers(1, 40), max_size=30)))
    handout, saved, given_up, ends = Handout(blocks), Counter[str](), list[str](), Counter[str]()
    computing: dict[int, deque[Block]] = {}
    computed: dict[int, list[Block]] = {}
    following = iter(range(10**6))
    for step in range(10**4):
        while len(computing) < 3:
            worker = next(following)
            handout.join(worker)
            computing[worker], computed[worker] = deque(), []
        for worker in computing:
            for order in handout.orders(worker):
                if order is None:
                    computed[worker] += computing[worker]
                    for _ in range(len(computing[worker])):
                        handout.computed(worker)
                    for block in computed[worker]:
                        handout.saved(worker, block.block_id)
                        saved[block.block_id] += 1
                    computing[worker], computed[worker] = deque(), []
                else:
                    computing[worker].append(order)
            assert len(computing[worker]) <= MOST_AHEAD
        if handout.is_finished:
            break
        worker = data.draw(st.sampled_from(sorted(computing)))
        if step < 200 and data.draw(st.booleans()):
            if computing[worker]:
                ends[computing[worker][0].block_id] += 1
            if block := handout.lost(worker):
                given_up.append(block.block_id)
            del computing[worker], computed[worker]
        elif computing[worker]:
            handout.computed(worker)
            computed[worker].append(computing[worker].popleft())
    assert handout.is_finished
    assert sorted([*saved, *given_up]) == sorted(block.block_id for block in blocks)
    assert set(saved.values()) <= {1}
    assert sorted(given_up) == sorted(block for block, count in ends.items() if count >= MOST_ENDS)


def test_where_little_is_left_nobody_hoards_it() -> None:
    handout = Handout(blocks_of([8] * 3))
    for worker in range(3):
        handout.join(worker)
    assert [len(list(handout.orders(worker))) for worker in range(2)] == [1, 1]
    assert [block is None for block in handout.orders(2)] == [False, True]


def test_what_a_lost_worker_had_comes_first() -> None:
    handout = Handout(blocks_of([8] * 20))
    handout.join(0)
    had = [block.block_id for block in handout.orders(0) if block]
    handout.lost(0)
    handout.join(1)
    assert [block.block_id for block in handout.orders(1) if block] == had


# ---------------------------------------------------------------- whole runs


class CrewHere:
    """Workers in this process. `ends(worker, task)`: whether that ends the worker in the place of computing it."""

    count = 2
    ends: Callable[[int, Task], bool] = staticmethod(lambda worker, task: False)
    stop_after = -1
    """Calls to compute; the user then asks for an end."""

    def __init__(self, order: Order, stop: object) -> None:
        self._order, self._stop = order, stop
        self._workers: dict[int, EncodingProcess] = {}
        self._calls: deque[tuple[int, str, object]] = deque()
        self._next = self._computed = 0

    def muster(self, ignored: Iterable[str]) -> int:
        while len(self._workers) < self.count:
            self._workers[self._next] = EncodingProcess(self._order)
            self._calls.append((self._next, "begin", list(ignored)))
            self._next += 1
        return self.count

    def compute(self, worker: int, task: Task) -> None:
        self._workers[worker].prepare(task)
        self._calls.append((worker, "compute", task))

    def flush(self, worker: int) -> None:
        self._calls.append((worker, "flush", None))

    def stop(self, worker: int) -> None:
        self._workers[worker].stop()

    def events(self, seconds: float) -> list[Event]:
        if not self._calls:
            return []
        worker, call, given = self._calls.popleft()
        if call == "compute":
            self._computed += 1
            if self._computed == self.stop_after:
                self._stop.signal_number = 15
            if self.ends(worker, given):
                self._drop(worker)
                return [Event(worker=worker, call=call, report=None, lost="it was ended")]
        process = self._workers[worker]
        try:
            report = process.begin(given) if call == "begin" else getattr(process, call)()
        except Exception as error:
            self._drop(worker)
            return [Event(worker=worker, call=call, report=None, error=error)]
        return [Event(worker=worker, call=call, report=report)]

    def _drop(self, worker: int) -> None:
        process = self._workers.pop(worker)
        if "_pipeline" in vars(process):
            shard = process._pipeline._writer
            shard._turn = lambda job: None  # what was not committed is gone
            shard._shard = None
        self._calls = deque(call for call in self._calls if call[0] != worker)


class DrivenHere(engine_module.ThisProcess):
    """The engine with a driver and no cluster."""

    def prepare(self, checkpoint, spec, limits) -> None:
        super().prepare(checkpoint, spec, limits)
        self._order = Order(settings=self._settings, spec=spec, shard_bytes=self.shard_bytes, limits=limits)

    shard_bytes = 2**28

    def compute(self, stored, blocks, stop):
        crew = CrewHere(self._order, stop)
        return Driver(crew, stored, self._reporter, stop, Sayings(self._reporter)).compute(blocks)


@pytest.fixture(autouse=True)
def workers_end(monkeypatch):
    """Of a cluster's process nothing is left when it ends; those in this one are ended here."""
    made: list[EncodingProcess] = []
    begin = EncodingProcess.__init__

    def noted(process: EncodingProcess, order: Order) -> None:
        made.append(process)
        begin(process, order)

    monkeypatch.setattr(EncodingProcess, "__init__", noted)
    yield
    for process in made:
        if "_pipeline" in vars(process):
            writer = process._pipeline._writer
            writer._writing.close()
            writer._committing.close()


@pytest.fixture
def driven(monkeypatch):
    monkeypatch.setattr(run_module, "engine_of", DrivenHere)


@pytest.fixture
def data(tmp_path):
    """Four episodes, in blocks of at least eight features."""
    write_dataset(tmp_path / "data", episodes=4, steps=9)
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, data, capsys):
    checkpoint = ToyCheckpoint()

    def precompute(name: str, *flags: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        arguments = ["precompute", "--vggt_model_path", "toy", "--data_root", data, *SIZE]
        arguments += ["--feature_dtype", "float32", "--cache_dir", tmp_path / name, *flags]
        with toy_encoder(checkpoint), mock.patch.object(ray_actor, "Checkpoint", checkpoint):
            code = main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("[ERROR]")]
        return code, [*out.replace(str(tmp_path / name), "CACHE").splitlines(), *errors]

    return precompute


def records(cache_dir: Path) -> dict[bytes, bytes]:
    with FeatureCache.open(cache_dir) as cache:
        assert cache.damaged_shards == ()
        return {key: cache.get_by_key(key).numpy().tobytes() for key in cache}


def lines_alike(lines: list[str]) -> list[str]:
    """All but how long the encoder took, and that a model was loaded, which is also done here to measure that."""
    parts = [line.partition("and the encoder takes")[0] for line in lines]
    return [part for part in parts if part != "[INFO] Model loaded successfully"]


def test_a_driven_run_says_and_stores_what_a_plain_one_does(run, data, tmp_path, monkeypatch) -> None:
    names = write_episode(data, "bad", 2, seed=5)
    write_annotations(data / "bad.jsonl", [[name] for name in names])
    (data / names[0]).write_bytes(b"no image")
    plain = run("plain", "--context", "causal", "--verify")
    monkeypatch.setattr(run_module, "engine_of", DrivenHere)
    driven = run("driven", "--context", "causal", "--verify")
    assert plain[0] == driven[0] == 3
    assert lines_alike(plain[1]) == lines_alike(driven[1])
    assert records(tmp_path / "plain") == records(tmp_path / "driven")
    again = run("driven", "--context", "causal")[1]
    assert "[INFO] Already in the cache: 37" in again
    listed = [
        json.loads(line)["path"] for line in (tmp_path / "driven" / "failures.jsonl").read_text().splitlines()
    ]
    assert listed == [str(data / names[0])]


@pytest.mark.usefixtures("driven")
def test_a_block_with_which_one_worker_after_another_ends_is_a_failure_and_nothing_else_is(
    run, data, tmp_path, monkeypatch
) -> None:
    killing = str(data / "ep1" / "0003.png")
    monkeypatch.setattr(CrewHere, "ends", staticmethod(lambda worker, task: killing in task.paths.values()))
    code, out = run("cache", "--context", "causal")
    assert code == 3
    lost = [line for line in out if "3 processes have ended while they computed" in line]
    assert len(lost) == 9
    assert all("ep1" in line for line in lost)
    assert "[SUCCESS] Processed 27 features" in out
    assert len(records(tmp_path / "cache")) == 27


@pytest.mark.usefixtures("driven")
def test_where_every_worker_ends_the_run_does(run, monkeypatch) -> None:
    monkeypatch.setattr(CrewHere, "ends", staticmethod(lambda worker, task: True))
    code, out = run("cache")
    assert code == 1
    assert out[-1].startswith("[ERROR] 9 processes of the cluster have ended one after another")
    assert "the last one because it was ended" in out[-1]


@pytest.mark.usefixtures("driven")
def test_a_stop_commits_what_is_finished_and_the_same_command_goes_on(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(CrewHere, "stop_after", 2)
    code, out = run("cache", "--context", "causal")
    assert code == 128 + 15
    (line,) = [line for line in out if "Stopped by SIGTERM" in line]
    done = int(line.split(": ")[1].split()[0])
    assert 0 < done == len(records(tmp_path / "cache")) < 36
    monkeypatch.setattr(CrewHere, "stop_after", -1)
    code, out = run("cache", "--context", "causal")
    assert (code, f"[SUCCESS] Processed {36 - done} features" in out) == (0, True)
    assert f"[INFO] Already in the cache: {done}" in out, "digests were noted"


@pytest.mark.usefixtures("driven")
def test_what_one_worker_raises_ends_the_run_in_its_sentence_and_the_others_commit(
    run, tmp_path, monkeypatch
) -> None:
    begin, compute = EncodingProcess.begin, EncodingProcess.compute
    workers: list[EncodingProcess] = []

    def begun(process: EncodingProcess, ignored: object) -> object:
        workers.append(process)
        return begin(process, ignored)

    def full(process: EncodingProcess) -> object:
        if process is workers[1]:
            raise CommitError("the disk is full")
        return compute(process)

    monkeypatch.setattr(EncodingProcess, "begin", begun)
    monkeypatch.setattr(EncodingProcess, "compute", full)
    code, out = run("cache", "--context", "causal")
    assert (code, out[-1]) == (2, "[ERROR] the disk is full")
    assert len(workers) == 2
    assert len(records(tmp_path / "cache")) > 0


# ---------------------------------------------------------------- what the cluster is asked for


@pytest.mark.parametrize(
    ("cores", "count", "share"),
    [
        ([2], 2, 1.0),
        ([2], 3, 0.6666),
        ([4, 2], 2, 2.0),
        ([3, 3], 4, 1.0),
        ([8], 1, 8.0),
        ([], 5, 1.0),
    ],
)
def test_as_many_actors_as_are_wanted_fit_on_the_cores(cores: list[float], count: int, share: float) -> None:
    assert share_of_cores(cores, count) == pytest.approx(share)
    assert not cores or sum(int(each / share_of_cores(cores, count)) for each in cores) >= count


def test_the_cluster_decides_the_device_and_never_this_machine() -> None:
    def kind(device: str, gpus: int, **more: object) -> str:
        flags = {"vggt_model_path": "m", "cache_dir": "c", "engine": "ray", "device": device, **more}
        return _kind_of_device(PrecomputeSettings(**flags), gpus)

    assert not torch.cuda.is_available()
    assert [kind("auto", 8), kind("auto", 0), kind("cuda", 8), kind("cpu", 8)] == [
        "cuda",
        "cpu",
        "cuda",
        "cpu",
    ]
    assert kind("cuda", 0, ray_actors=4) == "cuda"
    with pytest.raises(SettingsError, match="the cluster has none now"):
        kind("cuda", 0)
    with pytest.raises(SettingsError, match="cuda:1 is no kind of device"):
        kind("cuda:1", 8)


def test_rays_client_is_refused() -> None:
    with pytest.raises(SettingsError, match="--ray_address auto"):
        _connect(None, "ray://head:10001")


def test_a_missing_ray_is_a_sentence_with_the_command_that_installs_it(run, monkeypatch) -> None:
    monkeypatch.setattr("vggt_cache.requirements._version", lambda name: None)
    code, out = run("cache", "--engine", "ray")
    assert code == 2
    assert out[-1].startswith("[ERROR] ray is not installed, for ")
    assert f"pip install 'ray>={LOWEST['ray']}'" in out[-1]


@pytest.mark.parametrize("flag", ["--ray_address=auto", "--ray_actors=2"])
def test_what_is_of_ray_is_refused_without_it(run, flag: str) -> None:
    code, out = run("cache", flag)
    assert (code, "is of --engine ray: give that too" in out[-1]) == (2, True)


def test_rays_long_messages_become_a_few_words() -> None:
    assert first_words("The actor died.\n\tpid: 7\nThe actor is dead because X. More: y.") == (
        "The actor is dead because X"
    )
    assert first_words("no route") == "no route"


def test_an_error_with_two_parts_travels_whole() -> None:
    error = copy.copy(SmallFileError("/a", "is full"))  # as pickle makes it anew
    assert (str(error), error.reason) == ("/a is full", "is full")
