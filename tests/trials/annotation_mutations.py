"""Annotation files as somebody makes them who means harm."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

from vggt_cache.samples.annotations import MAX_RECORD_BYTES

RECORDS: tuple[dict[str, Any], ...] = (
    {
        "id": 7,
        "images": ["a/000.png", "a/001.png", "b.png"],
        "conversations": [{"from": "human", "value": "<image> go"}, {"from": "gpt", "value": "STOP"}],
    },
    {
        "data_path": "a",
        "history_images": ["000.png"],
        "current_image": "001.png",
        "instruction": "go",
        "action": "FORWARD",
    },
    {"image": "b.png", "conversations": []},
    {"conversations": [{"from": "human", "value": "no image"}]},
)
NAMES: tuple[Any, ...] = (
    *("", ".", "..", "/", "../../../../etc/passwd", "a/../b.png", "a/./000.png", "a//000.png", "loop/x.png"),
    *(
        "/dev/zero",
        "/proc/self/mem",
        "fifo",
        "a\0b.png",
        "\ud800.png",
        "\udc80.png",
        "x" * 255,
        "x" * 256,
        "é雪.png",
    ),
    *(
        "x" * 4097,
        "a/" * 2000,
        "../" * 1300 + "b.png",
        "http://host/a.png",
        "~/a.png",
        "-rf",
        "a\nb",
        "\u202e.png",
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**53, 2**63, 10**400, 1e308, -0.0, 1.5, "", [], {}, [[]], [None], {"": {}}),
    *(["a.png"] * 3000, [["a.png"]], {"images": ["a.png"]}, "\0", "\ud800", "x" * 100_000),
)
RAW = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e-999",
        "9" * 5000,
        "0123",
        "1.",
        "+1",
        "'a'",
        '"\\x"',
        '"\\ud800"',
    ),
    *(
        '"\\u0000"',
        '"a',
        "tru",
        "[1,]",
        "{,}",
        '{"a":1,"a":2}',
        '{"images":["a.png"],"images":["b.png"]}',
        "/*c*/1",
    ),
)
"""Texts that stand in the place of a value: most of them are no JSON."""
SPOILT_BYTES = (
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b"]",
    b"}",
    b'"',
    b"\\",
    b",",
)
_HOLE = "hole-that-is-filled"


def hostile_file(random: Random) -> tuple[str, bytes]:
    """The end of its name, `.jsonl` or `.json`, and what it holds."""
    records = [_record(random) for _ in range(random.choice((1, 1, 2, 5, 12)))]
    lines = random.random() < 0.5
    if lines:
        data = random.choice((b"\n", b"\n", b"\r\n", b"\n\n \n", b"\r")).join(records)
    else:
        data = b"[" + random.choice((b",", b", ", b",\n", b"\n", b",,")).join(records) + b"]"
    for _ in range(random.choice((0, 0, 0, 1, 1, 3))):
        data = _spoil(data, random)
    return random.choice((".jsonl", ".JSONL") if lines else (".json", ".Json")), data


def _record(random: Random) -> bytes:
    record = json.loads(json.dumps(random.choice(RECORDS)))
    fills: list[str] = []
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        _change(record, fills, random)
    text = json.dumps(record, ensure_ascii=random.random() < 0.7)
    for fill in fills:
        text = text.replace(f'"{_HOLE}"', fill, 1)
    return text.encode("utf-8", random.choice(("surrogatepass", "replace")))


def _change(record: dict[str, Any], fills: list[str], random: Random) -> None:
    """A field, or an item in one, becomes something else or goes."""
    field = random.choice(
        (*record, "images", "image", "history_images", "current_image", "data_path", "conversations")
    )
    value = _value(fills, random)
    inner = record.get(field)
    if isinstance(inner, list) and inner and random.random() < 0.6:
        inner[random.randrange(len(inner))] = value
    elif random.random() < 0.1:
        record.pop(field, None)
    else:
        record[field] = value


def _value(fills: list[str], random: Random) -> Any:
    kind = random.random()
    if kind < 0.45:
        return random.choice(NAMES)
    if kind < 0.8:
        return deepcopy(random.choice(VALUES))
    fills.append(_nested(random) if kind < 0.9 else random.choice(RAW))
    return _HOLE


def _nested(random: Random) -> str:
    """Brackets in brackets; often as deep as the interpreter just allows, or just not."""
    depth = random.choice((50, 500, random.randint(900, 1000), random.randint(900, 1000), 5000, 200_000))
    begin, end = random.choice((("[", "]"), ('{"a":', "}"), ('[{"images":', "}]")))
    return begin * depth + "1" + end * (depth if random.random() < 0.8 else 0)


def _spoil(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    kind = random.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + random.choice(SPOILT_BYTES) + data[at:]
    if kind == 2:
        return data[:at] + random.choice(SPOILT_BYTES) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[random.randrange(len(data) + 1) :]
    if kind == 4:
        return random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 100, b" " * 300_000, b"\n" * 1000)) + data
    return data[:at] + _giant(random) + data[at:]


def _giant(random: Random) -> bytes:
    """Rarely more than a record may have, since that takes a while."""
    length = MAX_RECORD_BYTES + 2 if random.random() < 0.003 else random.choice((5_000, 300_000))
    return random.choice((b"[", b'"', b"1", b" ", b"\\", b'{"a":', b"\0")) * length


def hostile_episode(random: Random) -> tuple[list[str], bytes]:
    """Names of the images of an episode folder, and its milestones_result.json."""
    good = [f"step_{number:04d}_FORWARD.png" for number in range(4)]
    odd = (
        "step_x_A.png",
        "step_0001_B.png",
        "step_999999999_A.jpg",
        "step_00000000001_A.png",
        "step__.png",
        "step_1_.webp",
    )
    names = random.sample(
        (*good, *odd, "step_٣_A.png", "step_5_é\udcff.png", "step_2_..png"), random.randint(1, 8)
    )
    record: dict[str, Any] = {
        "instruction_text": "go",
        "subinstructions": ["a", "b"],
        "completion_checkpoints": [{"checkpoint_frame_index": 1}],
    }
    fills: list[str] = []
    for _ in range(random.choice((0, 1, 2))):
        record[random.choice((*record, "x"))] = _value(fills, random)
    text = json.dumps(record)
    for fill in fills:
        text = text.replace(f'"{_HOLE}"', fill, 1)
    data = text.encode("utf-8", "surrogatepass")
    return names, _spoil(data, random) if random.random() < 0.3 else data
