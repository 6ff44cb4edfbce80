"""From training to a walk: what training saves is all that evaluation needs, in either layout."""

from __future__ import annotations

from pathlib import Path

from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.export.directory import export
from janusvln.inference import Navigator, Prompt
from janusvln.train.command import main
from train_kit import ACTIONS, PROMPT, Kit, write_conversations

STEPS = 3


def test_a_model_that_learned_an_episode_by_heart_walks_it_and_so_does_its_export(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    """Only with the prompt, the frames and the features of training are the answers those that it has learned."""
    data = write_conversations(tmp_path / "data", episodes=1, steps=STEPS)
    kit = Kit(
        data=data,
        qwen=write_tiny_qwen(tmp_path / "qwen"),
        vggt=small_checkpoint,
        cache=tmp_path / "none",
    )
    more = ["--max_steps", 60, "--learning_rate", "3e-3", "--per_device_train_batch_size", STEPS]
    out, exported = tmp_path / "out", tmp_path / "exported"
    assert main(kit.flags(out, *more, context="causal", cached=False)) == 0
    export(str(out), str(exported), str(small_checkpoint))
    prompt = Prompt(text=PROMPT.replace("{task}", "{instruction}"))
    frames = [path.read_bytes() for path in sorted((data / "ep0").iterdir())]
    for model, vggt in ((out, small_checkpoint), (exported, exported)):
        navigator = Navigator.load(str(model), str(vggt), prompt, device="cpu", max_new_tokens=24)
        episode = navigator.start("walk to room 0")
        answers = [navigator.act(episode, frame) for frame in frames]
        assert [answer.action for answer in answers] == list(ACTIONS[:STEPS])
        assert all(answer.complete for answer in answers)
