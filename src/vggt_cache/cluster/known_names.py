"""Names that the installed transformers knows, before anything imports it: that takes seconds, and torch."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

from vggt_cache.errors import SettingsError

_UNLIKE_THEIR_PACKAGE = ("azure_ml", "dagshub", "flyte", "kubeflow")


def check_names(*, optim: str, lr_scheduler_type: str, report_to: str) -> None:
    """Raises SettingsError for an optimizer, schedule or logger that transformers does not have."""
    _check("OPTIM", optim, ("adamw_torch_fused", "adamw_torch"), "training_args.py", "OptimizerNames")
    schedules = "trainer_utils.py", "SchedulerType"
    _check("LR_SCHEDULER_TYPE", lr_scheduler_type, ("cosine", "constant", "linear"), *schedules)
    loggers = "integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK"
    _check("REPORT_TO", report_to, ("tensorboard", "none", "all"), *loggers)


def _check(variable: str, given: str, usual: Sequence[str], file: str, name: str) -> None:
    """`usual`: values that need no look at transformers' source."""
    if given in usual or not (known := names_of(file, name)):
        return
    if given not in known:
        near, *_ = *get_close_matches(given, usual, 1), *get_close_matches(given, known, 1), usual[0]
        raise SettingsError(
            f"{variable} is '{given}', which transformers {version('transformers')} does not know: give {near}, or "
            f"another of its {len(known)} {name}"
        )
    if variable == "REPORT_TO" and given not in _UNLIKE_THEIR_PACKAGE and not importlib.util.find_spec(given):
        raise SettingsError(
            f"REPORT_TO is '{given}', and its package is not installed for {sys.executable}: run {sys.executable} -m "
            f"pip install {given.replace('_', '-')}, or set REPORT_TO=none"
        )


def names_of(file: str, name: str) -> tuple[str, ...]:
    """The values of a class of constants, or the keys of a dict, at the top of one of transformers' files.

    Empty where the installed version has it elsewhere: then the trainer, which has it imported, says what is wrong.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return ()
    try:
        body = ast.parse((Path(package.origin).parent / file).read_bytes()).body
    except (OSError, SyntaxError):
        return ()
    found: list[ast.expr | None] = []
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = [line.value for line in node.body if isinstance(line, ast.Assign)]
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Dict)
            and ast.unparse(node.targets[0]) == name
        ):
            found = node.value.keys
    return tuple(one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str))
