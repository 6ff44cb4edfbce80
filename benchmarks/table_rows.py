"""What the rows of the table of figures say, in numbers: from a result to the values of each of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Values = dict[str, Any]
Row = tuple[str, Values]
"""A row's name, under which `table_texts.py` has its cells in each language, and what the cells need."""


def rows_of(theme: str, figures: Values, settings: Values) -> Iterator[Row]:
    """None for a theme that is not shown in this table."""
    if theme in THEMES:
        yield from THEMES[theme](figures, settings)


def row(_name: str, *given: Values, **values: object) -> Row:
    return _name, {name: value for one in (*given, values) for name, value in one.items()}


def precompute(figures: Values, settings: Values) -> Iterator[Row]:
    yield row(
        "precompute",
        settings,
        seconds=f"{figures['precompute_s']:.1f}",
        ratio=f"{figures['ratio']:.2f}",
        limit=f"{figures['encoder_alone_s']:.1f}",
    )
    if "of_encoder_alone" in figures:  # older results have not got it
        yield row(
            "precompute_steady",
            settings,
            written=f"{figures['written_per_s']:.1f}",
            share=f"{figures['of_encoder_alone']:.2f}",
            limit=f"{figures['written_per_s'] / figures['of_encoder_alone']:.1f}",
        )


def scaling(figures: Values, settings: Values) -> Iterator[Row]:
    yield row(
        "scaling",
        settings,
        ratio=f"{figures['ratio']:.2f}",
        bare=f"{figures['bare_ratio']:.2f}",
        over=f"{figures['ratio_over_bare']:.2f}",
    )


def causal(figures: Values, settings: Values) -> Iterator[Row]:
    yield row(
        "causal",
        samples=figures["samples"],
        seconds=f"{figures['shared_s']:.1f}",
        ratio=f"{figures['ratio']:.2f}",
        shared=figures["frame_passes_shared"],
        tower=figures["tower_passes_shared"],
        limit=f"{figures['published_s']:.1f}",
        passes=figures["frame_passes_published"],
        flops=f"{figures['ratio_of_flops']:.2f}",
    )
    if "of_frame_efficiency" in figures:  # older results have not got it
        yield row(
            "causal_efficiency",
            features=f"{figures['features_per_s']:.1f}",
            share=f"{figures['of_frame_efficiency']:.2f}",
            limit=f"{figures['features_per_s'] / figures['of_frame_efficiency']:.1f}",
        )


def planning(figures: Values, settings: Values) -> Iterator[Row]:
    run, limits = figures["unchanged_run"], figures["limits"]
    yield row(
        "planning",
        settings,
        samples=f"{settings['samples']:,}",
        images=f"{settings['images']:,}",
        seconds=f"{run['elapsed_s']:.1f}",
        memory=round(run["peak_memory_bytes"] / 1e6),
        opened=run["opened"]["images"],
        parse=f"{limits['json_parse_s']:.2f}",
        stat=f"{limits['stat_s']:.2f}",
    )


def reading(figures: Values, settings: Values) -> Iterator[Row]:
    yield row(
        "reading",
        {"record": f"{figures['record_bytes'] / 1e6:.1f}"},
        settings,
        {way: f"{speed / 1e9:.1f}" for way, speed in figures["bytes_per_s"].items()},
        into=f"{figures['get_into_buffer_over_limit']:.2f}",
        over=f"{figures['delivery_over_limit_with_checksum']:.2f}",
        times=f"{figures['delivery_over_dataloader']:.0f}",
    )


def cold(figures: Values, settings: Values) -> Iterator[Row]:
    """One row for all limits of the throttled disk, one for the slow mount, one for the disk as it is."""
    limits = [f"throttled_{limit}" for limit in settings["limits_mb_per_s"]]
    groups = {"cold_throttled": limits, "cold_latency": ["latency"], "cold_disk": ["disk"]}
    for name, devices in groups.items():
        found = [figures.get(device, {}) for device in devices]
        if all("bytes_per_s" in one for one in found):
            yield row(name, _cold_values(found, settings))


def _cold_values(devices: list[Values], settings: Values) -> Values:
    def each(pattern: str, number: Callable[[Values], float]) -> str:
        return " / ".join(pattern.format(number(device)) for device in devices)

    def device_mb_per_s(one: Values) -> float:
        return one["bytes_per_s"]["sequential"] / 1e6

    return {
        "limits": " / ".join(map(str, settings["limits_mb_per_s"])),
        "latency": f"{1e3 * settings['latency_s']:g}",
        "device": each("{:.0f}", device_mb_per_s),
        "delivery": each("{:.0f}", lambda one: one["delivery_over_device"] * device_mb_per_s(one)),
        "over": each("{:.2f}", lambda one: one["delivery_over_device"]),
        "ahead": each("{:.2f}", lambda one: one["loop"]["ahead_over_step"]),
        "needed": each("{:.2f}", lambda one: one["loop"]["when_needed_over_step"]),
        "past": each("{:.0f}", lambda one: one["bytes_per_s"]["past_2"] / 1e6),
        "core": each("{:.2f}", lambda one: one["cpu_s_per_gb"]["delivery_2"]),
        "past_core": each("{:.2f}", lambda one: one["cpu_s_per_gb"]["past_2"]),
        "checksum": each("{:.2f}", lambda one: one["checksum_s_per_gb"]),
    }


def object_store(figures: Values, settings: Values) -> Iterator[Row]:
    if not settings["url"]:  # of another server nothing is known
        cache, alone = figures["ways"]["cache"], figures["ways"]["obstore"]
        yield row(
            "object_store",
            settings,
            record=f"{figures['record_bytes'] / 1e6:.1f}",
            rate=f"{cache['MB_per_s']:.0f}",
            core=f"{cache['core_s_per_GB']:.2f}",
            over=f"{figures['cache_over_obstore']:.2f}",
            limit=f"{alone['MB_per_s']:.0f}",
            limit_core=f"{alone['core_s_per_GB']:.2f}",
        )


def staging(figures: Values, settings: Values) -> Iterator[Row]:
    ways = figures["ways"]
    yield row(
        "staging",
        wire=f"{settings['mb_per_s']:g}",
        staged=f"{ways['staged']['over_alone']:.2f}",
        through=f"{ways['through']['over_alone']:.2f}",
        share=f"{100 * settings['share']:.0f}",
        part=f"{ways['part']['over_alone']:.2f}",
        local=f"{100 * ways['part']['local']:.0f}",
        lru=f"{100 * figures['lru']['simulated']:.0f}",
    )


def writing(figures: Values, settings: Values) -> Iterator[Row]:
    for codec_name, one in figures.items():
        yield row(
            "writing",
            codec=codec_name,
            size=round(one["shard_bytes"] / 1e6),
            file_system=settings["file_system"],
            ours=round(one["bytes_per_s"]["ours"] / 1e6),
            over=f"{one['over_limit']:.2f}",
            raw=round(one["bytes_per_s"]["raw"] / 1e6),
            early=round(one["bytes_per_s"]["raw_early"] / 1e6),
        )


def writer(figures: Values, settings: Values) -> Iterator[Row]:
    for width in settings["image_size"]:
        one = figures[f"width_{width}"]
        yield row(
            "writer",
            width=width,
            file_system=settings["file_system"],
            ours=round(one["frames_per_s"]),
            over=f"{one['over_limit']:.2f}",
            limit=round(one["limit_frames_per_s"]),
        )


def index(figures: Values, settings: Values) -> Iterator[Row]:
    counts = list(figures["sizes"])
    large, rebuild = figures["sizes"][counts[-1]], figures["rebuild"]
    yield row(
        "index",
        records=f"{int(counts[-1]):,}",
        least=f"{int(counts[0]):,}",
        open=f"{1e3 * large['open_s']:.1f}",
        lookup=f"{1e6 * large['lookup_s']:.1f}",
        memory=f"{large['private_bytes'] / 1e6:.1f}",
        get=f"{figures['get_largest_over_smallest']:.2f}",
        listing=f"{1e3 * large['listing_s']:.1f}",
        search=f"{1e6 * large['searchsorted']['lookup_s']:.1f}",
        dict=f"{1e6 * large['dict']['lookup_s']:.1f}",
        dict_memory=f"{large['dict']['private_bytes'] / 1e6:.0f}",
    )
    yield row(
        "index_rebuild",
        shards=f"{settings['shards']:,}",
        records=f"{rebuild['records']:,}",
        seconds=f"{rebuild['rebuild_s']:.1f}",
        over=f"{rebuild['over_limit']:.2f}",
        limit=f"{rebuild['read_and_parse_s']:.1f}",
    )


def codec(figures: Values, settings: Values) -> Iterator[Row]:
    size = settings["sizes"][0]
    one, speeds = figures[size], {name: f"{speed:.1f}" for name, speed in figures["gb_per_s"].items()}
    yield row(
        "codec_lossless",
        speeds,
        size=size,
        ratio=f"{one['lossless_ratio']:.3f}",
        bound=f"{one['bound']:.3f}",
    )
    yield row(
        "codec_int8",
        speeds,
        size=size,
        ratio=f"{one['int8_ratio']:.3f}",
        error=f"{100 * one['int8_relative_error']:.2f}",
        worst=f"{100 * one['int8_worst_token']:.2f}",
    )


def loss(figures: Values, settings: Values) -> Iterator[Row]:
    for dtype in ("bfloat16", "int8"):
        one = figures[dtype]
        yield row(
            "loss",
            settings,
            dtype=dtype,
            middle=f"{100 * one['middle_relative_difference']:.3f}",
            largest=f"{100 * one['largest_relative_difference']:.3f}",
            end=f"{100 * one['end_loss_relative_difference']:.3f}",
            other=f"{100 * figures['end_loss_of_another_order_relative']:.3f}",
        )


def startup(figures: Values, settings: Values) -> Iterator[Row]:
    yield row(
        "startup",
        settings,
        samples=f"{settings['samples']:,}",
        data=f"{figures['seconds_for_the_data']:.1f}",
        start=f"{figures['seconds_to_first_step']:.1f}",
        parse=f"{figures['json_parse_s']:.1f}",
    )


def step(figures: Values, settings: Values) -> Iterator[Row]:
    yield row(
        "step",
        {way: f"{seconds:.3f}" for way, seconds in figures["seconds_per_step"].items()},
        size=settings["size"],
        tokens=figures["tokens"],
        over=f"{figures['cached_over_resident']:.3f}",
        speedup=f"{figures['reference_over_cached']:.1f}",
    )
    if "largest_batch" in figures:
        yield row("step_batch", figures["largest_batch"], size=settings["size"])


def encoder(figures: Values, settings: Values) -> Iterator[Row]:
    for width in settings["widths"]:
        for context, speed in (("frame", "frames_per_s"), ("causal", "frame_passes_per_s")):
            one = figures[f"{context}_{width}"]
            yield row(
                "encoder",
                size=settings["size"],
                dtype=settings["compute_dtype"],
                context=context,
                width=width,
                frames=f"{one[speed]:.2f}",
                share=f"{100 * one['share_of_matrix_peak']:.0f}",
                peak=f"{figures['matrix_peak_flop_per_s'] / 1e12:.2f}",
            )


THEMES: dict[str, Callable[[Values, Values], Iterator[Row]]] = {
    one.__name__: one
    for one in (
        precompute, scaling, causal, planning, reading, cold, object_store, staging, writing, writer, index, codec,
        loss, startup, step, encoder,
    )
}  # fmt: skip
