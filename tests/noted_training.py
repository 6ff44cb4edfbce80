"""The training command, which also notes the samples of each step: `noted_training.py NOTES FLAG...`.

NAN_AT=step:rank makes the features of that step not a number.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from janusvln.train.command import leave, main
from janusvln.train.trainer import FeatureTrainer

_prepare_inputs = FeatureTrainer._prepare_inputs


def noting(trainer: FeatureTrainer, inputs: dict[str, Any]) -> dict[str, Any]:
    step, rank = trainer.state.global_step + 1, int(os.environ.get("RANK", 0))
    samples = [request.index for request in inputs.get("feature_requests", ())]
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps([step, rank, samples]) + "\n")
    prepared = _prepare_inputs(trainer, inputs)
    if os.environ.get("NAN_AT") == f"{step}:{rank}":
        prepared["spatial_features"] = [feature * math.nan for feature in prepared["spatial_features"]]
    return prepared


if __name__ == "__main__":
    FeatureTrainer._prepare_inputs = noting  # type: ignore[method-assign]
    leave(main(sys.argv[2:]))
