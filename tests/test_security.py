"""What docs/security.md promises and no other test shows: a run watched from inside, and what it leaves behind."""

from __future__ import annotations

import ast
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from small_data import SIZE, write_annotations, write_dataset
from store_kit import SPEC, holds, save_index, shards_dir, write_shard
from vggt_cache import FeatureCache
from vggt_cache.errors import CacheAccessError
from vggt_cache.precompute.claims import Claims

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted((ROOT / "src").rglob("*.py"))

# ---------------------------------------------------------------- what the code may call, whatever it is named there

FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve", "yaml",
    "code", "codeop", "runpy", "ctypes",
}  # fmt: skip
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("numpy.load", "pandas.read_pickle", "os.system", "os.popen"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
}
FORBIDDEN_FLAGS = {"allow_pickle", "shell", "trust_remote_code", "weights_only"}
"""Keywords that only a call which could do harm takes."""
EXCEPTIONS = {
    "src/vggt_cache/encoder/pickled.py": [
        "return torch.load(source, map_location='cpu', weights_only=True)",
    ]
}
"""Of each file the statements that may stand there: one, which a user asks for by name."""


def names_bound_by_imports(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `from torch import load as f` makes `f` stand for `torch.load`."""
    meant = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                meant[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return meant


def forbidden(source: str) -> list[str]:
    tree = ast.parse(source)
    meant = names_bound_by_imports(tree)
    found = [name for name in meant.values() if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, dot, rest = ast.unparse(node).partition(".")
            name = meant.get(first, first) + dot + rest
            if name in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {name}")
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_FLAGS:
            found.append(f"line {node.lineno}: {node.arg}=")
    return found


def without_exceptions(path: Path) -> str:
    """The source without the statements that `EXCEPTIONS` names, each of which must be there once."""
    source = ast.unparse(ast.parse(path.read_text()))
    for statement in EXCEPTIONS.get(str(path.relative_to(ROOT)), ()):
        assert source.count(statement) == 1
        source = source.replace(statement, "return None")
    return source


@pytest.mark.parametrize(
    "source",
    [
        "import marshal", "from yaml import load", "import torch as t\nt.load(f)", "from torch import load as l\nl(f)",
        "from numpy import load\nload(f)", "import builtins as b\nb.eval(t)", "run = exec\nrun(t)",
        "from os import system as s\ns(c)", "import os\nos.popen(c)", "f(x, allow_pickle=True)", "f(c, shell=True)",
        "f(n, trust_remote_code=True)", "compile(t, n, 'exec')",
    ],
)  # fmt: skip
def test_the_search_for_forbidden_calls_sees_them_under_other_names(source: str) -> None:
    assert forbidden(source)


def test_the_search_lets_harmless_namesakes_pass() -> None:
    assert not forbidden(
        "import re, json\nre.compile(p)\njson.load(f)\nmodel.eval()\nself.load(f)\nx.compile()"
    )


@pytest.mark.promise("Never run")
def test_the_packages_hold_no_call_that_runs_what_a_file_says() -> None:
    assert len(PACKAGES) > 100
    found = {str(path.relative_to(ROOT)): forbidden(without_exceptions(path)) for path in PACKAGES}
    assert {name: calls for name, calls in found.items() if calls} == {}


# ---------------------------------------------------------------- a whole run, watched by the interpreter's own hook

WATCH = r"""
import os, sys, threading

events = []
here = threading.local()
system_open = os.open


def open_and_note_where(path, flags, mode=0o777, *, dir_fd=None):
    # The interpreter does not tell its hook of dir_fd, so it is noted beside the call.
    here.directory = None if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    try:
        return system_open(path, flags, mode, dir_fd=dir_fd)
    finally:
        here.directory = None


def place(path, dir_fd=-1):
    directory = getattr(here, "directory", None) or os.getcwd()
    if dir_fd not in (-1, None):
        directory = os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.realpath(os.path.join(directory, os.fsdecode(path)))


def importing():
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_find_and_load":
        frame = frame.f_back
    return frame is not None


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Not marshal.loads: the interpreter itself reads the code of modules with it, and some are imported late.
NEVER = ("pickle.find_class", "socket.", "subprocess.Popen", "os.system", "os.exec", "os.fork",
         "os.posix_spawn", "os.symlink", "ctypes.dlopen", "urllib.Request", "code.__new__")


def hook(event, arguments):
    if event.startswith(NEVER):
        events.append((event, repr(arguments)[:200]))
    elif event == "compile" and not importing():
        events.append((event, str(arguments[1])))
    elif event == "exec" and not importing():
        events.append((event, getattr(arguments[0], "co_filename", "?")))
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITES:
        events.append(("write", place(arguments[0])))
    elif event == "os.mkdir":
        events.append(("write", place(arguments[0], arguments[2])))
    elif event in ("os.remove", "os.rmdir"):
        events.append(("write", place(arguments[0], arguments[1])))
    elif event == "os.rename":
        events.append(("write", place(arguments[1], arguments[3])))
    elif event == "os.link":
        events.append(("write", place(arguments[1], arguments[3])))


def watch():
    os.open = open_and_note_where
    sys.addaudithook(hook)
"""
RUN = r"""
import contextlib, io, json
from vggt_cache import FeatureCache
from vggt_cache.cli import main
import vggt_cache.precompute.run, vggt_cache.precompute.verify, vggt_cache.inspection

commands, cache_dir, frames = json.loads(sys.argv[1])
watch()
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    codes = [main(command) for command in commands]
with FeatureCache.open(cache_dir) as cache:
    read = sum(cache.get_by_key(key) is not None for key in cache) + (cache.get(frames) is not None)
seen = list(events)
print(json.dumps({"codes": codes, "read": read, "events": seen, "said": said.getvalue()}))
"""
STRANGER = "user-that-nobody-else-has"


def child(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**kept, **environment}
    )


def watched(statement: str) -> list[str]:
    """The names of the events of one statement."""
    run = child(
        f"{WATCH}\nimport pickle, io, socket, subprocess, tempfile\nwatch()\n{statement}\nprint(events)"
    )
    assert run.returncode == 0, run.stderr
    return [name for name, _ in ast.literal_eval(run.stdout.splitlines()[-1])]


@pytest.mark.parametrize(
    ("statement", "event"),
    [
        ("pickle.loads(b'cbuiltins\\nlen\\n.')", "pickle.find_class"),
        ("os.system('true')", "os.system"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("eval(compile('1', 'a file', 'eval'))", "compile"),
        ("exec('pass')", "exec"),
        ("socket.gethostname()", "socket.gethostname"),
        ("open(os.devnull, 'w').close()", "write"),
        ("os.close(os.open(os.devnull, os.O_RDWR))", "write"),
        ("os.rename(tempfile.mkdtemp(), tempfile.mktemp())", "write"),
    ],
)
def test_the_watch_sees(statement: str, event: str) -> None:
    assert event in watched(statement)


class Run:
    """One run of precompute, with verification, `info`, a `verify` over all records, and reading."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.places = [folder / f"{name}-that-nobody-else-has" for name in ("data", "cache", "checkpoint")]
        self.data, self.cache_dir, self.checkpoint = self.places
        self.checkpoint.symlink_to(checkpoint)
        lists = write_dataset(self.data, episodes=1, steps=3)
        write_annotations(self.data / "more.jsonl", [["gone.png"]])
        base = ["precompute", "--vggt_model_path", self.checkpoint, "--data_root", self.data]
        commands = [
            [*base, "--cache_dir", self.cache_dir, *SIZE, "--verify"],
            ["verify", self.cache_dir],
            ["verify", self.cache_dir, "--data_root", self.data],
            ["info", self.cache_dir],
            ["prune", self.cache_dir, "--yes"],
        ]
        frame = str(self.data / lists[0][0])
        settings = json.dumps(
            [[[str(word) for word in words] for words in commands], str(self.cache_dir), [frame]]
        )
        before = {path for path in folder.rglob("*") if self.cache_dir not in path.parents}
        names = {"USER": STRANGER, "LOGNAME": STRANGER, "HOME": str(folder / STRANGER)}
        run = child(WATCH + RUN, settings, **names)
        assert run.returncode == 0, run.stderr
        self.result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        after = {path for path in folder.rglob("*") if self.cache_dir not in path.parents}
        self.appeared = after - before - {self.cache_dir}
        self.files = [path for path in self.cache_dir.rglob("*") if path.is_file()]

    def events(self, name: str) -> list[str]:
        return [detail for event, detail in self.result["events"] if event == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Any:
    folder = tmp_path_factory.mktemp("watched")
    yield Run(folder, small_checkpoint)
    shutil.rmtree(folder)


def test_the_watched_run_did_its_work(run: Run) -> None:
    # 3: one image is missing. `verify --data_root` misses its feature, which is 1.
    assert run.result["codes"] == [3, 0, 1, 0, 0], run.result["said"]
    assert run.result["read"] == 3 + 1


@pytest.mark.promise("Never run")
def test_a_run_unpickles_nothing_starts_nothing_and_calls_nobody(run: Run) -> None:
    allowed = {"write", "compile", "exec"}
    assert [event for event in run.result["events"] if event[0] not in allowed] == []


@pytest.mark.promise("Never run")
def test_a_run_compiles_and_executes_nothing_but_the_modules_that_it_imports(run: Run) -> None:
    # <unknown>: the standard library's ast.parse, which makes a tree and runs nothing.
    assert set(run.events("compile")) <= {"<unknown>"}
    assert run.events("exec") == []


def test_a_run_writes_below_its_cache_directory_and_nowhere_else(run: Run) -> None:
    written = set(run.events("write"))
    assert sum("/shards/.tmp-" in path for path in written) >= 1
    outside = {p for p in written if Path(p) != run.cache_dir and run.cache_dir not in Path(p).parents}
    assert outside <= {os.devnull}
    assert run.appeared == set()


# ---------------------------------------------------------------- what a store tells of its maker


def tells(data: bytes, words: list[str]) -> list[str]:
    return [word for word in words if word.encode() in data]


def test_no_file_of_a_store_tells_user_host_or_place(run: Run) -> None:
    # Three letters stand by chance in any payload, so a real name is looked for where it is long enough to mean it.
    real = [name for name in (getpass.getuser(), socket.gethostname(), str(Path.home())) if len(name) >= 7]
    words = [STRANGER, "that-nobody-else-has", *real]
    assert len(run.files) >= 5
    telling = {path.name: found for path in run.files if (found := tells(path.read_bytes(), words))}
    # The log of what could not be used names it: that is what it is for.
    assert telling == {"failures.jsonl": ["that-nobody-else-has"]}


def test_a_shards_header_says_what_the_format_documents_and_no_more(run: Run) -> None:
    (path,) = run.cache_dir.glob("*/shards/*.safetensors")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.pop("__metadata__")
    assert len(header) == 3
    assert metadata.keys() == {"format", "format_version", "spec", "fingerprint", *header}
    texts = [value for value in json.loads(metadata["spec"])["encoder"].values() if isinstance(value, str)]
    assert all(re.fullmatch(r"[0-9a-f]{64}|dinov2_vit\w+_reg|float32|bfloat16", text) for text in texts)


def test_a_claim_tells_its_process_and_not_its_host(tmp_path: Path) -> None:
    with Claims(tmp_path):
        (alive,) = tmp_path.glob("*.alive")
        process = json.loads(alive.read_text())
    assert process.keys() == {"machine", "pid", "started"}
    assert re.fullmatch(r"[0-9a-f]{16}|", process["machine"])


# ---------------------------------------------------------------- folders that are links


def test_a_folder_of_shards_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    folder = shards_dir(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheAccessError):
        FeatureCache.open(tmp_path, spec=SPEC)


def test_a_folder_of_the_index_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    rows = save_index(tmp_path)
    rows.parent.rename(tmp_path / "elsewhere")
    rows.parent.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "rows").write_bytes(b"not an index")
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])
        with pytest.warns(UserWarning, match="could not be saved"):
            assert not cache.save_index()
    assert (tmp_path / "elsewhere" / "rows").read_bytes() == b"not an index"
