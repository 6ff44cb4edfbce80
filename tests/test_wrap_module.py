"""A `CachedModule` gives what the module gave, bit for bit, and only for the same module and inputs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from store_kit import make_spec
from vggt_cache import CachedAggregator, CachedModule, FeatureCache, Staging
from vggt_cache.cli import main
from vggt_cache.encoder import EncoderConfig
from vggt_cache.errors import MissingFeatureError, SettingsError, SpecMismatchError
from vggt_cache.store import create_store
from vggt_cache.wrap import shelf
from vggt_cache.wrap.calls import from_record, put_together, take_apart, to_record
from vggt_module import FrameByFrame, with_golden_weights

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
IMAGES = torch.rand((3, 3, 28, 28), generator=torch.Generator().manual_seed(0))


def dinov2() -> nn.Module:
    torch.manual_seed(1)
    return Dinov2Model(Dinov2Config(**SIZES, patch_size=14)).eval().requires_grad_(False)


def siglip() -> nn.Module:
    torch.manual_seed(2)
    config = SiglipVisionConfig(**SIZES, patch_size=14, intermediate_size=64)
    return SiglipVisionModel(config).eval().requires_grad_(False)


def equal(one: Any, other: Any) -> bool:
    (form, leaves), (other_form, other_leaves) = (
        (take_apart(value, found), found) for value, found in ((one, []), (other, []))
    )
    return form == other_form and all(map(torch.equal, leaves, other_leaves))


class Calls(nn.Module):
    """Counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self._calls = 0
        self._rows: list[int] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        self._rows.append(len(x))
        return {"y": x * self.weight * scale, "rows": torch.arange(len(x)) * 0}


@pytest.mark.parametrize("make", [dinov2, siglip])
@pytest.mark.parametrize("named", [{}, {"output_hidden_states": True}, {"return_dict": False}])
def test_encoders_of_transformers_bit_for_bit(make: Any, named: dict[str, Any], tmp_path: Path) -> None:
    module = make()
    live = module(pixel_values=IMAGES, **named)
    cached = CachedModule(module, tmp_path)
    assert equal(cached(pixel_values=IMAGES, **named), live)
    cached.flush()
    strict = CachedModule(make(), tmp_path, miss="error")
    found = strict(pixel_values=IMAGES, **named)
    assert type(found) is type(live)
    assert equal(found, live)
    assert equal(strict(pixel_values=IMAGES[[2, 0]], **named)[0], live[0][[2, 0]])


def changed_weight(module: nn.Module) -> None:
    next(module.parameters()).mul_(2)


def changed_setting(module: nn.Module) -> None:
    module.layernorm.eps = 0.5


@pytest.mark.parametrize("change", [changed_weight, changed_setting, nn.Module.bfloat16])
def test_another_module_misses(change: Any, tmp_path: Path) -> None:
    CachedModule(dinov2(), tmp_path)(IMAGES)
    module = dinov2()
    change(module)
    images = IMAGES.to(next(module.parameters()).dtype)
    with pytest.raises(MissingFeatureError):
        CachedModule(module, tmp_path, miss="error")(images)
    live = module(images)
    assert equal(CachedModule(module, tmp_path)(images), live)


def test_another_autocast_and_another_input_miss(tmp_path: Path) -> None:
    cached = CachedModule(dinov2(), tmp_path)
    cached(IMAGES)
    cached.flush()
    strict = CachedModule(dinov2(), tmp_path, miss="error")
    for images in (IMAGES + 1e-3, IMAGES.double(), IMAGES[:, :, :14]):
        with pytest.raises(MissingFeatureError):
            strict(images)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(MissingFeatureError):
        strict(IMAGES)
    with pytest.raises(MissingFeatureError):
        strict(IMAGES, output_hidden_states=True)
    strict(IMAGES)


def test_weights_that_change_in_place_are_noticed(tmp_path: Path) -> None:
    module = dinov2()
    cached = CachedModule(module, tmp_path)
    before = cached(IMAGES)
    changed_weight(module)
    assert not equal(cached(IMAGES), before)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_staged_is_read_without_the_cache(tmp_path: Path, ahead: bool) -> None:
    module, inputs = dinov2(), IMAGES
    stage = Staging(local_dir=tmp_path / "local")
    with torch.no_grad():
        filling = CachedModule(module, tmp_path / "cache")
        computed = filling(inputs)
        filling.close()
        if ahead:
            assert main(["stage", str(tmp_path / "cache"), str(tmp_path / "local")]) == 0
        else:
            reading = CachedModule(module, tmp_path / "cache", miss="error", stage=stage)
            assert equal(reading(inputs), computed)
            reading.close()
        for path in (tmp_path / "cache").rglob(
            "*.safetensors"
        ):  # whoever reads its records finds them damaged
            path.chmod(0o644)
            begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            path.write_bytes(path.read_bytes()[:begin] + bytes(path.stat().st_size - begin))
        staged = CachedModule(module, tmp_path / "cache", miss="error", stage=stage)
        assert equal(staged(inputs), computed)
        staged.close()


def test_only_missing_samples_are_computed(tmp_path: Path) -> None:
    module = Calls().eval()
    cached = CachedModule(module, tmp_path)
    x = torch.arange(16.0).view(4, 4)
    cached(x[:2], scale=2.0)
    module._rows.clear()
    assert torch.equal(cached(x, scale=2.0)["y"], x * 2)
    assert module._rows == [2]


def test_a_whole_call_is_one_where_the_first_dimension_is_no_batch(tmp_path: Path) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(0)

    x = torch.arange(8.0).view(2, 4)
    for rows in (x, x[:1]):
        with pytest.raises(SettingsError, match="batch=False"):
            CachedModule(Mixing().eval(), tmp_path)(rows)
    cached = CachedModule(Mixing().eval(), tmp_path, batch=False)
    for _ in range(2):
        assert torch.equal(cached(x), x + x.mean(0))


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape)

    class Counting(nn.Module):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    x = torch.ones(1, 4)
    for module, why in ((Noisy(), "draws random numbers"), (Counting(), "another output")):
        with pytest.raises(SettingsError, match=why):
            CachedModule(module.eval(), tmp_path)(x)
    training = dinov2().train()
    with pytest.raises(SettingsError, match="training mode"):
        CachedModule(training, tmp_path)(IMAGES)
    with pytest.raises(SettingsError, match="require gradients"):
        CachedModule(dinov2().requires_grad_(True), tmp_path)(IMAGES)
    with pytest.raises(SettingsError, match="of type function"):
        CachedModule(Calls().eval(), tmp_path)(x, scale=lambda: 1)


def test_a_stored_class_is_looked_up_in_the_modules_package_alone() -> None:
    form = {"class": "os:environ", "items": []}
    with pytest.raises(Exception, match="which the package transformers"):
        put_together(form, [], "transformers")


@pytest.mark.parametrize("output", [(torch.ones(2), None, [torch.zeros(0, 3), {"a": torch.tensor([True])}])])
def test_outputs_of_any_form_come_back(output: Any) -> None:
    leaves: list[Tensor] = []
    form = take_apart(output, leaves)
    found = put_together(*from_record(to_record(form, leaves), torch.device("cpu")), "x")
    assert equal(found, output)


def test_a_copy_reads_the_same_cache(tmp_path: Path) -> None:
    cached = CachedModule(dinov2(), tmp_path)
    live = cached(IMAGES)
    cached.flush()
    assert equal(copy.deepcopy(cached)(IMAGES), live)


@pytest.mark.parametrize("is_told", [True, False])
def test_inputs_that_differ_in_every_epoch_are_noticed_once(
    tmp_path: Path, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_LOOKUPS_UNTOLD", 55)
    cached = CachedModule(Calls().eval(), tmp_path)
    cached(torch.ones(1, 4))
    if is_told:
        cached.flush()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in torch.rand((120, 1, 4), generator=torch.Generator().manual_seed(1)):
            for _ in range(2):  # as activation checkpointing asks, which is no second epoch
                cached(x)
    assert len([one for one in caught if "random augmentation" in str(one.message)]) == 1


def test_inputs_that_are_the_same_in_every_epoch_are_not_complained_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_LOOKUPS_UNTOLD", 55)
    cached = CachedModule(Calls().eval(), tmp_path)
    x = torch.rand((30, 1, 4), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in x.repeat(3, 1, 1):
            cached(row)


def test_the_commands_tell_check_and_remove_what_modules_gave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    x = torch.arange(16.0).view(4, 4)
    kept, other = Calls().eval(), Calls().eval()
    other.weight.add_(1)
    for module in (kept, other):
        cached = CachedModule(module, tmp_path)
        cached(x)
        cached.close()
    code, out, _ = run("info", tmp_path)
    assert code == 0
    assert "2 specifications" in out
    assert out.count(f"outputs of {__name__}.Calls, weights ") == 2
    assert out.count("4 in 1 shard") == 2
    found = json.loads(run("info", tmp_path, "--json")[1])["stores"]
    fingerprints = [store["fingerprint"] for store in found]
    assert all(store["disk_bytes"] > 4 * 4096 for store in found)
    assert "2 caches" in run("verify", tmp_path)[2]
    assert run("prune", tmp_path, "--spec", fingerprints[0], "--yes")[0] == 0
    assert "4/4 valid" in run("verify", tmp_path)[1]
    assert "nothing to remove" in run("prune", tmp_path)[1]
    (shard,) = tmp_path.glob(f"module-{fingerprints[1][:16]}/shards/*")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(damaged)
    create_store(tmp_path, make_spec())  # of features, which are meant where none is named
    assert "0/0 valid" in run("verify", tmp_path)[1]
    code, out, _ = run("verify", tmp_path, "--fingerprint", fingerprints[1][:8])
    assert (code, "3/4 valid" in out) == (1, True)
    assert "1 of its records are damaged" in run("prune", tmp_path, "--damaged", "--yes")[1]
    assert "3/3 valid" in run("verify", tmp_path, "--fingerprint", fingerprints[1])[1]
    assert run("verify", tmp_path, "--fingerprint", fingerprints[1], "--layer", -2)[0] == 2
    with pytest.raises(SpecMismatchError):
        FeatureCache.open(tmp_path, fingerprint=fingerprints[1])  # outputs of modules are no features


# ---------------------------------------------------------------- the aggregator as its own producer


def test_an_aggregator_may_produce_its_outputs_itself(small_config: EncoderConfig, tmp_path: Path) -> None:
    module = with_golden_weights(small_config, FrameByFrame)
    module._resnet_mean += 1  # another network than ours
    cached = CachedAggregator(module, tmp_path, producer="module")
    images = torch.rand((3, 1, 1, 3, 28, 42), generator=torch.Generator().manual_seed(3))
    found = []
    for walked in (module, cached, cached):
        past: list[Any] = [None] * 4
        for number, image in enumerate(images):
            outputs, _, past = walked(image, past_key_values=past, use_cache=True, past_frame_idx=number)
        found.append(outputs[-2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
