"""One training run, from its settings to the saved model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from signal import Signals

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from janusvln.data.collate import PackedCollator, PaddedCollator
from janusvln.data.dataset import NavigationDataset, sources_of
from janusvln.features.computed import CacheFiller, LiveEncoder
from janusvln.features.resolve import (
    check_resumed_with,
    check_trained_with,
    live_spec,
    open_cache,
    summary,
)
from janusvln.features.source import FeatureSource
from janusvln.model import lora
from janusvln.model.attention import attention_implementation
from janusvln.model.checkpoints import find_directory
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as _Model
from janusvln.train.arguments import Arguments
from janusvln.train.checkpoints import (
    check_model,
    checkpoint_to_resume,
    copy_model,
    given_checkpoint,
    is_finished,
    trained_features,
    writing,
)
from janusvln.train.learning import freeze
from janusvln.train.ranks import Ranks, agree_on_snapshot
from janusvln.train.run_record import RunRecord
from janusvln.train.samples import SampleDesk, listed_samples, settle_samples, skipped_text
from janusvln.train.stop import EXIT_CODES, StopCallback, StopRequest
from janusvln.train.trainer import EpochCallback, FeatureTrainer
from janusvln.train.workers import check_shared_memory, lost_workers_told
from vggt_cache.delivery import ReadAhead
from vggt_cache.errors import DataError, SettingsError, VggtCacheError, errors_as
from vggt_cache.identity import FeatureSpec
from vggt_cache.output import print_line
from vggt_cache.samples import Problem, SampleIndex, Sources
from vggt_cache.store import FeatureCache, list_stores
from vggt_cache.store.directory import describe_spec

_MAX_PROBLEMS_TOLD = 10


class TrainingRun:
    """The parts of a run, made in order. Every rank makes its own."""

    def __init__(self, arguments: Arguments, ranks: Ranks, stop: StopRequest) -> None:
        self.arguments = arguments
        self.model_arguments, self.data, self.features, self.training = arguments
        self.ranks = ranks
        self.stop = stop
        self.model_path = str(self.model_arguments.model_name_or_path)
        self.device = self.training.device
        self.output_dir = str(self.training.output_dir)
        self.fills = self.features.vggt_cache_miss == "fill"

    def run(self) -> int:
        """The exit code: 0, or that of a run that was told to stop. Raises VggtCacheError for what a user can cure."""
        set_seed(self.training.seed)
        spec, cache = self._spec_and_cache()
        sources = sources_of(self.data.train_data_root, self.data.annotation_path, self.data.data_path)
        problems: list[Problem] = []
        index = self._index(sources, problems)
        record = self._record(index)
        checkpoint = self._checkpoint(spec, record)
        tokenizer = self._tokenizer()
        dataset = NavigationDataset(
            index,
            tokenizer,
            model_dir=str(self.model_dir),
            spec=spec,
            options=self.data,
            action_head=self.model_arguments.action_head,
        )
        encoder = LiveEncoder(self.features.vggt_model_path, spec, self.device)
        dataset, skipped = self._settled(
            dataset, sources, problems, cache, encoder, resumed=checkpoint is not None
        )
        record = replace(record, skipped=skipped_text(skipped))
        model = self._model(spec)
        source = self._source(spec, cache, encoder)
        try:
            return self._train(model, dataset, tokenizer, source, record, checkpoint)
        finally:
            source.close()
            if cache is not None:
                cache.close()

    # ------------------------------------------------------------ features

    def _spec_and_cache(self) -> tuple[FeatureSpec, FeatureCache | None]:
        wanted, device = self.features, self.device.type
        if wanted.vggt_cache_dir is None:
            spec = live_spec(wanted, wanted.vggt_model_path, device)
            self._say(f"No feature cache: VGGT runs in every step; {describe_spec(spec)}")
            return spec, None
        cache = open_cache(
            wanted.vggt_cache_dir,
            wanted,
            fill=self.fills,
            location=wanted.vggt_model_path,
            device=device,
            io=wanted.vggt_cache_io,
            stage=wanted.stage,
        )
        cache = agree_on_snapshot(cache, self.ranks)
        self._say(f"VGGT feature cache enabled: {cache.cache_dir}")
        if cache.spec.feature_dtype == "int8":
            self._say(
                "Features are kept in int8, which changes their values by about half a percent: docs/codecs.md"
            )
        if others := [spec for spec in list_stores(cache.cache_dir) if spec != cache.spec]:
            self._say(f"The directory also holds {'; '.join(map(describe_spec, others))}")
        self._say(f"{describe_spec(cache.spec)}; {len(cache)} features in {len(cache.shard_names())} shards")
        return cache.spec, cache

    def _record(self, index: SampleIndex) -> RunRecord:
        """As rank 0 sees the data: one rank reads the annotations once more, and not all of them."""
        own = ["", ""] if self.ranks.rank else [index.digest(), skipped_text(listed_samples(self.output_dir))]
        digest, skipped = json.loads(self.ranks.exchange("samples", json.dumps(own))[0])
        return RunRecord.of(self.arguments, samples=len(index), samples_digest=digest, skipped=skipped)

    def _checkpoint(self, spec: FeatureSpec, record: RunRecord) -> str | None:
        """What this run goes on from, if anything: a checkpoint of the same run, trained with the same features."""
        given = self.training.resume_from_checkpoint
        if given:
            checkpoint = given_checkpoint(str(given), self.output_dir, record, self.ranks)
        else:
            checkpoint = checkpoint_to_resume(self.output_dir, record, self.ranks)
        if checkpoint:
            self._warn(check_resumed_with(trained_features(checkpoint), spec, checkpoint))
        return checkpoint

    def _source(self, spec: FeatureSpec, cache: FeatureCache | None, encoder: LiveEncoder) -> FeatureSource:
        given, reader, filler = self.features, None, None
        if cache is not None:
            reader = ReadAhead(cache, self.device, threads=given.vggt_cache_threads)
            filler = CacheFiller(cache.cache_dir, spec, warn=self.ranks.warn) if self.fills else None
        on_hit = _say_hit if os.environ.get("VGGT_CACHE_DEBUG") == "1" else None
        return FeatureSource(
            reader=reader, encoder=encoder, miss=given.vggt_cache_miss, filler=filler, on_hit=on_hit
        )

    # ------------------------------------------------------------ data

    def _index(self, sources: Sources, problems: list[Problem]) -> SampleIndex:
        for remark in sources.remarks():
            self._say(remark)
        index = SampleIndex(sources, on_problem=problems.append)
        told = [f"{problem.where} {problem.reason}" for problem in problems[:_MAX_PROBLEMS_TOLD]]
        if len(problems) > len(told):
            told.append(f"{len(problems) - len(told)} more samples cannot be used")
        self._warn(told)
        if not len(index):
            raise DataError(
                "the data holds no sample to train on: check --train_data_root or --annotation_path"
            )
        return index if self.data.max_samples < 0 else index.first(self.data.max_samples)

    def _settled(
        self,
        dataset: NavigationDataset,
        sources: Sources,
        problems: Sequence[Problem],
        cache: FeatureCache | None,
        encoder: LiveEncoder,
        *,
        resumed: bool,
    ) -> tuple[NavigationDataset, Sequence[int]]:
        """The samples that are trained on, and the numbers of the others; and an encoder that can be had, where
        features are missing."""
        miss = self.features.vggt_cache_miss
        desk = SampleDesk(
            dataset=dataset,
            problems=problems,
            sources=sources,
            cache=cache,
            miss=miss,
            skip=self.data.bad_samples == "skip",
            output_dir=self.output_dir,
            resumed=resumed,
            say=self._say,
        )
        settled = settle_samples(desk, self.ranks)
        if miss != "error" and (settled.missing or settled.unknown):
            try:
                encoder.check()
            except VggtCacheError as error:
                if settled.missing:
                    raise
                self._warn([f"should one of them be missing, this run ends: {error}"])
        dataset = dataset.without(settled.skipped) if settled.skipped else dataset
        check_shared_memory(dataset, self.training)
        return dataset, settled.skipped

    @cached_property
    def model_dir(self) -> Path:
        """Where --model_name_or_path lies: one download for all that read from it. Raises CheckpointError."""
        return find_directory(self.model_path, cache_dir=self.training.cache_dir)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        fault = f"--model_name_or_path {self.model_path} has no tokenizer that can be read"
        remedy = ": give the whole directory of a Qwen2.5-VL or JanusVLN model"
        with errors_as(SettingsError, fault, remedy, OSError, ValueError):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.model_dir, padding_side="right", model_max_length=self.data.model_max_length
            )
        return tokenizer

    # ------------------------------------------------------------ model

    def _model(self, spec: FeatureSpec) -> _Model:
        arguments = self.model_arguments
        attention = arguments.attn_implementation or attention_implementation()
        fault = (
            f"--model_name_or_path {self.model_path} cannot be loaded with --attn_implementation {attention}"
        )
        with errors_as(SettingsError, fault, ": give another one, or leave it out", ImportError, ValueError):
            model: _Model = _Model.from_pretrained(
                str(self.model_dir),
                attn_implementation=attention,
                # DeepSpeed keeps float32 copies of bfloat16 weights. Without it they are float32, under autocast.
                dtype=torch.bfloat16 if self.training.bf16 and self.training.deepspeed else torch.float32,
                spatial_channels=spec.encoder.channels,
                action_head=arguments.action_head,
                distill_loss_weight=arguments.distill_loss_weight,
                **({} if arguments.lam is None else {"lam": arguments.lam}),
            )
        self._warn(check_trained_with(model.config.feature_spec, spec, self.model_path))
        model.config.feature_spec = summary(spec)
        model.config.use_cache = False
        if arguments.lora_enable:
            self._add_adapters(model)
        freeze(model, arguments)
        if self.training.vision_tower_lr is not None and not arguments.tune_mm_vision:
            self._warn(
                ["--vision_tower_lr has no effect: the vision tower is not trained (--tune_mm_vision)"]
            )
        return model

    def _add_adapters(self, model: _Model) -> None:
        given, path = self.model_arguments, Path(self.model_path)
        # Rank 0 reads all weights once more; the others wait without a collective.
        own = "" if self.ranks.rank else lora.digest_of(self.model_dir)
        lora.add_adapters(
            model,
            str(path.absolute()) if path.exists() else self.model_path,
            self.ranks.exchange("base of the adapters", own)[0],
            r=given.lora_r,
            alpha=given.lora_alpha,
            dropout=given.lora_dropout,
            targets=given.lora_target_modules,
        )

    def _train(
        self,
        model: _Model,
        dataset: NavigationDataset,
        tokenizer: PreTrainedTokenizerBase,
        source: FeatureSource,
        record: RunRecord,
        checkpoint: str | None,
    ) -> int:
        collator = PackedCollator() if self.data.data_flatten else PaddedCollator(tokenizer.pad_token_id)
        trainer = FeatureTrainer(
            model=model,
            args=self.training,
            processing_class=tokenizer,
            train_dataset=dataset,
            data_collator=collator,
            source=source,
            pixels=dataset.pixels,
            record=record,
            settings_from=self.model_dir,
        )
        trainer.add_callback(EpochCallback(trainer, self.ranks, fills=self.fills))
        if checkpoint and is_finished(checkpoint, self.training):
            return self._left_as_it_is(checkpoint)
        if checkpoint:
            check_model(checkpoint, model.config, self.model_path)
            lora.check_resumed(model, Path(checkpoint))
            self._say(f"Resuming from {checkpoint}")
        stopping = StopCallback(self.stop, self.ranks)
        trainer.add_callback(stopping)
        with lost_workers_told():
            trainer.train(resume_from_checkpoint=checkpoint)
        if stopping.signal:
            return self._stopped(stopping.signal, trainer.state.global_step)
        model.config.use_cache = True
        return self._saved(trainer)

    # ------------------------------------------------------------ how it ends; each returns the exit code

    def _left_as_it_is(self, checkpoint: str) -> int:
        self._say(f"Nothing is left to train: {checkpoint} is the end of this run", "SUCCESS")
        if self.ranks.rank == 0:
            copy_model(checkpoint, self.output_dir)
        return 0

    def _stopped(self, by: Signals, step: int) -> int:
        # A launcher ends the others when one has ended: not before all is saved.
        self.ranks.exchange("stopped", "")
        kept = f"{os.path.abspath(self.output_dir)}/checkpoint-{step}"
        self._say(
            f"Stopped by {by.name} after step {step}: {kept} holds it, and the same command goes on from there"
        )
        return EXIT_CODES[by]

    def _saved(self, trainer: FeatureTrainer) -> int:
        saved = os.path.abspath(self.output_dir)
        with writing(Path(saved)):
            trainer.save_model()
            trainer.save_state()
        if self.model_arguments.lora_enable:
            self._say(f"To make one model of it: python -m janusvln.export.merge {saved} OUT")
        self._say(f"Model saved in {saved}", "SUCCESS")
        return 0

    def _say(self, text: str, level: str = "INFO") -> None:
        if self.ranks.rank == 0:
            print_line(level, text)

    def _warn(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self._say(sentence, "WARN")


def _say_hit(index: int) -> None:
    print_line("DEBUG", f"Using cached features for sample {index}")
