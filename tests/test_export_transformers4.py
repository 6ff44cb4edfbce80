"""An exported model under transformers 4.50, in an environment of its own. Installs gigabytes.

JANUSVLN_SRC may name the `src` folder of JanusVLN's code, which then runs itself: its model, its VGGT, its evaluation
mode. TRANSFORMERS4_PYTHON may name an interpreter that has torch and transformers 4.50 already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation_kit import make_frames, write_trained
from janusvln.data.images import QwenPixels
from janusvln.export.directory import export
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from janusvln.model.streaming import StreamingFeatures
from model_kit import prompt, rows
from transformers4_logits import LAM
from vggt_cache.encoder import Checkpoint

GRID = (2, 4)
FRAMES = 4
SCRIPT = Path(__file__).parent / "transformers4_logits.py"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if named := os.environ.get("TRANSFORMERS4_PYTHON"):
        yield named
        return
    directory = tmp_path_factory.mktemp("transformers4") / "venv"
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    release = torch.__version__.partition("+")[0]
    wanted = [f"torch=={release}", "transformers==4.50.0", "einops", "numpy", "pillow"]
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(
            f"transformers 4.50 cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}"
        )
    yield str(python)
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_4_50_gives_the_logits_of_our_model(
    python: str, small_checkpoint: Path, tmp_path: Path, tied: bool
) -> None:
    trained, exported = write_trained(tmp_path, small_checkpoint, lam=LAM, tied=tied), tmp_path / "exported"
    export(str(trained), str(exported), str(small_checkpoint))
    frames = torch.stack([torch.from_numpy(frame[:42, :56]) for frame in make_frames(FRAMES)]).contiguous()
    stream = StreamingFeatures(Checkpoint.open(str(small_checkpoint)).load())
    features = [stream.push(frame) for frame in frames]
    pixels = QwenPixels(str(trained)).values(frames)
    inputs = {
        **rows(prompt(*[GRID] * FRAMES)),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, *GRID]] * FRAMES),
    }
    model = JanusVLN.from_pretrained(trained).eval()
    with torch.no_grad():
        ours, other = (
            model(**inputs, spatial_features=[seen]).logits for seen in (features[-1], features[0])
        )
    save_file({**inputs, "frames": frames, "feature": features[-1]}, tmp_path / "case")
    command = [python, SCRIPT, exported, tmp_path / "case", tmp_path / "out"]
    command += [os.environ["JANUSVLN_SRC"]] if os.environ.get("JANUSVLN_SRC") else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "out")
    print(
        f"largest difference of a logit {(ours - theirs['logits']).abs().max():.1e} of {ours.abs().max():.1f}"
    )
    torch.testing.assert_close(theirs["logits"], ours, rtol=0, atol=1e-4)
    assert (ours - other).abs().max() > 0.1  # the feature matters
    assert torch.equal(theirs["pixel_values"], pixels)
    ids = rows(prompt(GRID))["input_ids"]
    assert theirs["said_ids"][0].tolist().count(int(ids.max())) == GRID[0] * GRID[1] // 4
    assert len(theirs["plain_ids"]) == len("hello") + 2
