"""The table of peers for docs/performance.md, from a result of `bench_peers.py`. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

ENGLISH = {
    "caption": "{features} features of {record} MB, page cache warm, one thread unless said otherwise; GB/s, in "
    "brackets the share of the limit beside it: `preadv` by one thread {preadv_1} GB/s, by {workers} threads "
    "{preadv_threads}; `write` and fsync {raw_write}. {machine}, {date}.",
    "head": "| kept by | one feature, fresh memory | into the caller's | batches of {batch_size}, {workers} workers | "
    "written and synced | opened with {entries} entries, one read | disk | SIGKILL while writing | a bit flipped |",
    "missing": "not measured: {reason}",
    "opening": "{milliseconds} ms, {megabytes} MB",
    "yes": "all kept, {trials} of {trials}",
    "no": "lost, or other bytes served, {failed} of {trials}",
    "partly": "lost, or other bytes served, {failed} of {trials}",
    "nothing": "reports nothing before its end",
    "flipped": "{noticed} of {flips} noticed",
    "failed": "failed",
    "why": "{name}, {what}: {reason}.",
}
CHINESE = {
    "caption": "{features} 个 {record} MB 的特征，页缓存已热，除注明外为单线程；单位 GB/s，括号内为占旁边极限的"
    "比例：单线程 `preadv` {preadv_1} GB/s，{workers} 线程 {preadv_threads}；`write` 加 fsync {raw_write}。"
    "{machine}，{date}。",
    "head": "| 存储方式 | 读一个特征，新内存 | 读入调用方内存 | 每批 {batch_size} 个，{workers} 个 worker | "
    "写入并落盘 | 打开 {entries} 条并读一条 | 占盘 | 写入中 SIGKILL | 翻转一位 |",
    "missing": "未测：{reason}",
    "opening": "{milliseconds} ms，{megabytes} MB",
    "yes": "{trials} 次全部保住",
    "no": "{trials} 次中 {failed} 次丢失或给出别的字节",
    "partly": "{trials} 次中 {failed} 次丢失或给出别的字节",
    "nothing": "写完之前不报告任何内容",
    "flipped": "{flips} 次发现 {noticed} 次",
    "failed": "失败",
    "why": "{name}，{what}：{reason}。",
}
TEXTS = {"en": ENGLISH, "zh": CHINESE}
COLUMNS = 9
MEASUREMENTS = ("speed", "opening", "killed", "flipped")


def lines(result: dict[str, Any], language: str) -> list[str]:
    """Caption, table, and why something was not measured; `language` is `en` or `zh`."""
    text, rows = TEXTS[language], result["figures"]["peers"]
    values = _values(result)
    table = [text["head"].format(**values), "|---" * COLUMNS + "|"]
    table += [_row(name, row, text) for name, row in rows.items()]
    reasons = [
        text["why"].format(name=name, what=what, reason=_plain(row[what]))
        for name, row in rows.items()
        for what in MEASUREMENTS
        if isinstance(row.get(what), str)
    ]
    return [text["caption"].format(**values), "", *table, *(["", *reasons] if reasons else [])]


def _values(result: dict[str, Any]) -> dict[str, Any]:
    figures, settings, machine = result["figures"], result["configuration"], result["machine"]
    return {
        **settings,
        **{way: f"{speed / 1e9:.1f}" for way, speed in figures["limits_bytes_per_s"].items()},
        "record": f"{figures['record_bytes'] / 1e6:.1f}",
        "entries": f"{settings['entries']:,}",
        "machine": f"{machine['cores']} x {machine['cpu']}",
        "date": result["date"],
    }


def _row(name: str, row: dict[str, Any], text: dict[str, str]) -> str:
    if "missing" in row:
        cells = [name, text["missing"].format(reason=_plain(row["missing"]))]
        cells += [""] * (COLUMNS - len(cells))
    else:
        cells = [f"{name} {row['version']}", *_speeds(row["speed"], text), _opening(row["opening"], text)]
        cells += [_disk(row["speed"], text), _killed(row["killed"], text), _flipped(row["flipped"], text)]
    return f"| {' | '.join(cells)} |"


def _speeds(speed: Any, text: dict[str, str]) -> list[str]:
    """One cell for each way; a way that the peer does not have is a dash."""
    ways = ("read", "read_into", "delivery", "write")
    if isinstance(speed, str):
        return [text["failed"]] * len(ways)
    return [
        f"{speed['bytes_per_s'][way] / 1e9:.2f} ({speed['over_limit'][way]:.2f})"
        if way in speed["over_limit"]
        else "-"
        for way in ways
    ]


def _opening(opening: Any, text: dict[str, str]) -> str:
    if isinstance(opening, str):
        return text["failed"]
    return text["opening"].format(
        milliseconds=f"{1e3 * opening['open_s']:.1f}", megabytes=f"{opening['private_bytes'] / 1e6:.1f}"
    )


def _disk(speed: Any, text: dict[str, str]) -> str:
    return text["failed"] if isinstance(speed, str) else f"{speed['disk_over_raw']:.3f}"


def _killed(killed: Any, text: dict[str, str]) -> str:
    if isinstance(killed, str):
        return text["failed"]
    return text[killed["verdict"]].format(trials=killed["interrupted"], failed=killed["failed"])


def _flipped(flipped: Any, text: dict[str, str]) -> str:
    return text["failed"] if isinstance(flipped, str) else text["flipped"].format(**flipped)


def _plain(reason: str) -> str:
    """A reason that breaks no table."""
    return reason.replace("|", "/").rstrip(".")
