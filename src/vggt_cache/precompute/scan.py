"""Reading the data root, in the guide's words."""

from __future__ import annotations

from vggt_cache.errors import DataError
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.plan import Plan, make_plan
from vggt_cache.precompute.report import Reporter, count_of


def scan_data(
    data_root: str, context: str, max_samples: int, reporter: Reporter, failures: FailureLog
) -> Plan:
    """Read the data root, telling what was found in the guide's words. Raises DataError."""
    reporter.info(f"Scanning data root: {data_root}")
    plan = make_plan(
        data_root, context, max_samples, lambda problem: failures.add(problem.where, problem.reason)
    )
    sources = plan.sources
    reporter.info(f"Found {len(sources.jsonl_files)} JSONL files")
    if sources.json_files:
        reporter.info(f"Found {len(sources.json_files)} JSON files")
    if sources.episode_dirs:
        reporter.info(f"Found {len(sources.episode_dirs)} episode folders")
    reporter.info(f"Total samples: {plan.sample_count}")
    if plan.text_only_count:
        reporter.info(f"{count_of(plan.text_only_count, 'sample')} without frames need no feature")
    if not len(plan):
        raise DataError(
            f"no sample below {data_root} names a frame, so there is nothing to compute: check --data_root, and the "
            "names of the fields (images, image, history_images and current_image)"
        )
    return plan
