"""Runs the launchers of scripts/ with a stand-in for Python that writes down how torchrun would be started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

# Starts no training: notes arguments and environment, then does as it is told. Everything else is the
# real Python, made to believe that its torch could use GPUs.
INTERPRETER = """#!/bin/sh
if [ "$2" = vggt_cache.cluster.torchrun ]; then
  exec {python} -c '
import json, os, signal, sys, time
seen = os.environ["SEEN"]
def note(number, frame):
    open(seen + ".signals", "a").write(signal.Signals(number).name + chr(10))
    time.sleep(0.3)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, note), signal.signal(signal.SIGTERM, note)
print("step 1\\rstep 2", flush=True)
print("[ERROR] of rank 1", file=sys.stderr, flush=True) if os.environ.get("CODE") else None
json.dump([sys.argv[1:], dict(os.environ), os.getpgrp()], open(seen + ".part", "w"))
os.rename(seen + ".part", seen)
if os.environ.get("RANKS"):
    import subprocess
    rank = "import signal, sys, time\\ndef end(*_): print(chr(10) + \\"rank: SIGTERM\\", flush=True); sys.exit(143)"
    rank += "\\nsignal.signal(signal.SIGTERM, end)\\nopen(sys.argv[1], \\"w\\")\\nwhile True: time.sleep(0.02)"
    sys.exit(1 if subprocess.call([sys.executable, "-c", rank, seen + ".rank"], start_new_session=True) else 0)
while os.environ.get("HOLD"): time.sleep(0.02)
sys.exit(int(os.environ.get("CODE", 0)))
' "$@"
fi
if [ "$2" = vggt_cache.cluster ]; then
  shift 2
  exec {python} -c '
import importlib.metadata, runpy
true = importlib.metadata.version
importlib.metadata.version = lambda name: true(name).removesuffix("+cpu")
runpy.run_module("vggt_cache.cluster", run_name="__main__", alter_sys=True)
' "$@"
fi
exec {python} "$@"
"""


class Launch:
    """One start of a launcher in `folder`, where `model` and `data` exist. `gpus`: what nvidia-smi lists."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        script: Path | str = "train_h800.sh",
        gpus: int = 0,
        **environment: str,
    ) -> None:
        self.folder = folder
        self.seen = folder / "seen"
        self._write("model/config.json", "{}")
        self._write("data/train.jsonl", "{}\n")
        self._tool("nvidia-smi", "#!/bin/sh\n" + "echo 'GPU 0: NVIDIA'\n" * gpus)
        interpreter = self._tool("py thon", INTERPRETER.format(python=f"'{sys.executable}'"))
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        given = {
            "PYTHON": str(interpreter),
            "MODEL_PATH": "model",
            "DATA_ROOT": "data",
            "SEEN": str(self.seen),
        }
        kept["PATH"] = f"{folder / 'bin'}:{kept['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(SCRIPTS / script), *flags], cwd=folder, env={**kept, **given, **environment}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def _tool(self, name: str, text: str) -> Path:
        path = self._write(f"bin/{name}", text)
        path.chmod(0o755)
        return path

    def finish(self) -> int:
        self.out, self.err = self.process.communicate(timeout=60)
        return self.process.returncode

    @property
    def started(self) -> bool:
        return self.seen.exists()

    @property
    def arguments(self) -> list[str]:
        """torchrun's, the module that it starts, and its flags."""
        arguments: list[str] = json.loads(self.seen.read_text())[0]
        return arguments

    @property
    def environment(self) -> dict[str, str]:
        environment: dict[str, str] = json.loads(self.seen.read_text())[1]
        return environment

    @property
    def process_group(self) -> int:
        return int(json.loads(self.seen.read_text())[2])

    def flag(self, name: str) -> str | None:
        """The value that the last flag of this name has."""
        places = [i for i, argument in enumerate(self.arguments) if argument == name]
        return self.arguments[places[-1] + 1] if places else None

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("outputs/*/*.log"))
