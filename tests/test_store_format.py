"""A shard's bytes: what our writer makes, what others can read, and what our reader refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from store_kit import SPEC, equal, make_feature, make_key, make_spec, shard_path, write_shard
from vggt_cache.errors import ShardFormatError
from vggt_cache.store.format import (
    ALIGNMENT_BYTES,
    MAX_CHANNELS,
    MAX_DATA_BYTES,
    MAX_HEADER_BYTES,
    MAX_RECORDS,
    MAX_SIDE,
    build_header,
    reserved_header_bytes,
)
from vggt_cache.store.header import ForeignShardError, parse_header
from vggt_cache.store.record import Record, payload_bytes, record_checksum

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def make_header(count: int = 3) -> bytes:
    start = reserved_header_bytes(SPEC, count)
    size = payload_bytes(SPEC, 2, 3)
    records = [Record(make_key(n), start + n * size, 2, 3, make_key(100 + n)) for n in range(count)]
    return build_header(SPEC, records, start)


def with_json(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A header whose JSON went through `change`, which changes its argument or returns another value."""
    header = json.loads(make_header()[8:])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------- what is written


@pytest.mark.promise("Never locked in")
@pytest.mark.parametrize("feature_dtype", ["bfloat16", "float16", "float32"])
def test_the_safetensors_library_reads_a_shard(tmp_path: Path, feature_dtype: str) -> None:
    spec = make_spec(feature_dtype=feature_dtype)
    path = shard_path(tmp_path, write_shard(tmp_path, range(5), spec), spec)
    tensors = load_file(path)
    assert sorted(tensors) == sorted(make_key(n).hex() for n in range(5))
    assert all(equal(tensors[make_key(n).hex()], make_feature(n, spec)) for n in range(5))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "vggt-feature-cache"
    assert metadata["format_version"] == "1"
    assert metadata["spec"] == spec.to_json()
    assert metadata["fingerprint"] == spec.fingerprint


def test_features_of_different_grids_share_a_shard(tmp_path: Path) -> None:
    features = {1: make_feature(1, h=5, w=1), 2: make_feature(2, h=1, w=7), 3: make_feature(3, h=4, w=4)}
    tensors = load_file(shard_path(tmp_path, write_shard(tmp_path, features)))
    assert all(equal(tensors[make_key(n).hex()], feature) for n, feature in features.items())


def test_data_begin_at_a_multiple_of_4096_and_end_with_the_file(tmp_path: Path) -> None:
    path = shard_path(tmp_path, write_shard(tmp_path, range(3)))
    data = path.read_bytes()
    header = parse_header(data, "x")
    assert min(record.offset for record in header.records) % ALIGNMENT_BYTES == 0
    assert header.data_end == len(data)


def test_the_reserved_header_holds_the_longest_records_there_can_be() -> None:
    """Every number with as many digits as the limits allow."""
    spec = make_spec(embed_dim=MAX_CHANNELS // 2)
    assert len(str(MAX_DATA_BYTES)) == len(str(10**15))
    assert len(str(MAX_SIDE)) == len(str(10**4))
    for count in (1, 7, 300, MAX_RECORDS):
        start = reserved_header_bytes(spec, count)
        records = [Record(make_key(n), start + 10**15, 10**4, 10**4, make_key(n)) for n in range(count)]
        assert len(build_header(spec, records, start)) == start


def test_the_largest_header_we_write_is_one_that_we_read() -> None:
    assert reserved_header_bytes(SPEC, MAX_RECORDS) < MAX_HEADER_BYTES
    assert len(parse_header(make_header(MAX_RECORDS), "x").records) == MAX_RECORDS


def test_a_header_says_what_was_put_into_it() -> None:
    records = parse_header(make_header(3), "x").records
    assert [(r.key, r.h, r.w, r.checksum) for r in records] == [
        (make_key(n), 2, 3, make_key(100 + n)) for n in range(3)
    ]


def test_the_checksum_covers_payload_key_shape_and_dtype() -> None:
    payload = bytes(payload_bytes(SPEC, 2, 3))
    checksums = {
        record_checksum(SPEC, make_key(1), 2, 3, payload),
        record_checksum(SPEC, make_key(2), 2, 3, payload),
        record_checksum(SPEC, make_key(1), 3, 2, payload),
        record_checksum(make_spec(feature_dtype="float16"), make_key(1), 2, 3, payload),
        record_checksum(make_spec(embed_dim=3), make_key(1), 2, 2, payload),
        record_checksum(SPEC, make_key(1), 2, 3, b"\x01" + payload[1:]),
    }
    assert len(checksums) == 6


# ---------------------------------------------------------------- docs/format.md


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.promise("Never locked in")
def test_the_program_in_the_documentation_reads_a_shard_without_our_code(tmp_path: Path) -> None:
    path = shard_path(tmp_path, write_shard(tmp_path, range(3)))
    (program,) = programs()
    assert "vggt_cache" not in program
    assert len(program.strip().splitlines()) <= 10
    script = tmp_path / "read_shard.py"
    script.write_text(program)
    run = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for n in range(3):
        assert any(line.startswith(make_key(n).hex()) and "True" in line for line in lines)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    run = subprocess.run([sys.executable, script, tmp_path / "damaged"], capture_output=True, text=True)
    assert run.stdout.count("False") == 1


def test_the_documentation_has_the_checksum_of_its_example() -> None:
    text = DOCUMENT.read_text()
    example = re.search(
        r"record_checksum example: key `([0-9a-f]{32})`.*?checksum `([0-9a-f]{32})`", text, re.DOTALL
    )
    assert example is not None
    key, checksum = example.groups()
    payload = torch.arange(24).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert record_checksum(SPEC, bytes.fromhex(key), 2, 3, payload).hex() == checksum


# ---------------------------------------------------------------- what is refused


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[make_key(0).hex()]  # type: ignore[no-any-return]


def rename(header: dict[str, Any], new: str) -> None:
    header[new] = header.pop(make_key(0).hex())
    header["__metadata__"][new] = header["__metadata__"].pop(make_key(0).hex())


def claim_spec(header: dict[str, Any], text: str) -> None:
    import hashlib

    header["__metadata__"]["spec"] = text
    header["__metadata__"]["fingerprint"] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def claim_channels(header: dict[str, Any], embed_dim: str, channels: int) -> None:
    """Another embed_dim, with records that agree with it."""
    claim_spec(header, SPEC_TEXT.replace('"embed_dim":2', f'"embed_dim":{embed_dim}'))
    for number in range(3):
        size = 2 * 3 * channels * 2
        entry = {"shape": [2, 3, channels], "data_offsets": [number * size, (number + 1) * size]}
        header[make_key(number).hex()].update(entry)


SPEC_TEXT = SPEC.to_json()
REFUSED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not an object": lambda h: [h],
    "no metadata": lambda h: h.pop("__metadata__") and None,
    "metadata no object": lambda h: h.update(__metadata__=7),
    "other format": lambda h: h["__metadata__"].update(format="pt"),
    "no version": lambda h: h["__metadata__"].pop("format_version") and None,
    "version a number": lambda h: h["__metadata__"].update(format_version=1),
    "spec no text": lambda h: h["__metadata__"].update(spec={}),
    "spec changed": lambda h: h["__metadata__"].update(spec=SPEC_TEXT.replace("518", "644")),
    "fingerprint changed": lambda h: h["__metadata__"].update(fingerprint="0" * 64),
    "spec unknown field": lambda h: claim_spec(h, SPEC_TEXT.replace("{", '{"a":1,', 1)),
    "spec no JSON": lambda h: claim_spec(h, "{"),
    "spec half a character": lambda h: claim_spec(h, "\ud800"),
    "spec deep": lambda h: claim_spec(h, "[" * 100_000),
    "channels a text": lambda h: claim_spec(h, SPEC_TEXT.replace('"embed_dim":2', '"embed_dim":"2"')),
    "channels enormous": lambda h: claim_spec(h, SPEC_TEXT.replace('"embed_dim":2', f'"embed_dim":{10**30}')),
    "channels nothing": lambda h: claim_channels(h, "0", 0),
    "channels a whole number of halves": lambda h: claim_channels(h, "2.5", 5),
    "channels negative": lambda h: claim_channels(h, "-2", -4),
    "channels too many": lambda h: claim_channels(h, str(MAX_CHANNELS), 2 * MAX_CHANNELS),
    "no checksum": lambda h: h["__metadata__"].pop(make_key(0).hex()) and None,
    "checksum too much": lambda h: h["__metadata__"].update({"0" * 32: "0" * 32}),
    "checksum short": lambda h: h["__metadata__"].update({make_key(0).hex(): "0" * 31}),
    "checksum upper case": lambda h: h["__metadata__"].update({make_key(0).hex(): "A" * 32}),
    "checksum with spaces": lambda h: h["__metadata__"].update({make_key(0).hex(): "00 " * 10 + "00"}),
    "checksum null": lambda h: h["__metadata__"].update({make_key(0).hex(): None}),
    "checksum no text": lambda h: h["__metadata__"].update({make_key(0).hex(): 5}),
    "name short": lambda h: rename(h, "abc"),
    "name a path": lambda h: rename(h, "../../../../../../../etc/passwd0"),
    "name upper case": lambda h: rename(h, "A" * 32),
    "name Arabic digits": lambda h: rename(h, "٠" * 32),
    "name enormous": lambda h: rename(h, "a" * 1_000_000),
    "entry no object": lambda h: h.update({make_key(0).hex(): []}),
    "entry field missing": lambda h: first(h).pop("dtype") and None,
    "entry field renamed": lambda h: first(h).update(kind=first(h).pop("dtype")),
    "entry field too much": lambda h: first(h).update(x=1),
    "dtype unknown": lambda h: first(h).update(dtype="I64"),
    "dtype of another spec": lambda h: first(h).update(dtype="F16"),
    "dtype null": lambda h: first(h).update(dtype=None),
    "dtype a list": lambda h: first(h).update(dtype=["BF16"]),
    "shape no list": lambda h: first(h).update(shape="234"),
    "shape of two": lambda h: first(h).update(shape=[6, 4]),
    "shape of four": lambda h: first(h).update(shape=[1, 2, 3, 4]),
    "shape a thousand deep": lambda h: first(h).update(shape=[1] * 1000),
    "shape float": lambda h: first(h).update(shape=[2.0, 3, 4]),
    "shape NaN": lambda h: first(h).update(shape=[float("nan"), 3, 4]),
    "shape true": lambda h: first(h).update(shape=[True, 6, 4]),
    "shape null": lambda h: first(h).update(shape=[None, 3, 4]),
    "shape zero": lambda h: first(h).update(shape=[0, 3, 4], data_offsets=[0, 0]),
    "shape negative": lambda h: first(h).update(shape=[-2, -3, 4]),
    "shape other channels": lambda h: first(h).update(shape=[2, 3, 7]),
    "shape enormous": lambda h: first(h).update(shape=[2**40, 3, 4]),
    "shape beyond 64 bits": lambda h: first(h).update(shape=[10**30, 3, 4]),
    "shape whose product overflows": lambda h: first(h).update(shape=[2**62, 4, 4]),
    "shape larger than its bytes": lambda h: first(h).update(shape=[3, 3, 4]),
    "offsets no list": lambda h: first(h).update(data_offsets={}),
    "offsets of one": lambda h: first(h).update(data_offsets=[0]),
    "offsets float": lambda h: first(h).update(data_offsets=[0.0, 48.0]),
    "offsets negative": lambda h: first(h).update(data_offsets=[-48, 0]),
    "offsets reversed": lambda h: first(h).update(data_offsets=[48, 0]),
    "offsets overlap": lambda h: first(h).update(data_offsets=[48, 96]),
    "offsets leave a gap": lambda h: first(h).update(data_offsets=[480, 528]),
    "offsets enormous": lambda h: first(h).update(data_offsets=[2**60, 2**60 + 48]),
    "offsets beyond 64 bits": lambda h: first(h).update(data_offsets=[0, 10**30]),
}


@pytest.mark.promise("hostile input")
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_a_header_that_the_format_does_not_allow_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ShardFormatError, match="shard some-name cannot be read") as caught:
        parse_header(with_json(change), "some-name")
    assert len(str(caught.value)) < 500


def replace_text(old: bytes, new: bytes) -> bytes:
    text = make_header()[8:].rstrip().replace(old, new, 1)
    return len(text).to_bytes(8, "little") + text


NAME = make_key(0).hex().encode()
RAW: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\x10\0\0\0\0\0\0",
    "length beyond the file": make_header()[:500],
    "length over the limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "length of all ones": b"\xff" * 8 + b"{}",
    "length 0": bytes(8),
    "length 1": b"\x01" + bytes(7) + b"{",
    "no bracket first": replace_text(b"{", b" {"),
    "two values": replace_text(b"}", b"}{}") + b"  ",
    "not UTF-8": replace_text(b"vggt-feature-cache", b"vggt-feature-cach\xff"),
    "a name twice": replace_text(b'{"__metadata__"', b'{"' + NAME + b'":{},"__metadata__"'),
    "metadata twice": replace_text(b'{"__metadata__"', b'{"__metadata__":{},"__metadata__"'),
    "a field twice": replace_text(b'{"dtype"', b'{"dtype":"BF16","dtype"'),
    "NaN": replace_text(b"[2,", b"[NaN,"),
    "Infinity": replace_text(b"[2,", b"[Infinity,"),
    "exponent": replace_text(b"[2,", b"[2e0,"),
    "digits without end": replace_text(b"[2,", b"[" + b"9" * 100_000 + b","),
    "brackets without end": (1_000_008).to_bytes(8, "little") + b'{"a":' + b"[" * 1_000_003,
    "braces without end": (1_000_000).to_bytes(8, "little") + b'{"a":' * 200_000,
    "some nesting": (30_000).to_bytes(8, "little") + b'{"a":' + b"[" * 29_995,
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW.keys())
def test_bytes_that_are_no_header_are_refused(data: bytes) -> None:
    with pytest.raises(ShardFormatError, match="shard some-name cannot be read"):
        parse_header(data, "some-name")


def test_another_version_is_told_from_damage() -> None:
    newer = with_json(lambda h: h["__metadata__"].update(format_version="3"))
    with pytest.raises(ForeignShardError, match=r"version '3' and this program reads versions 1 and 2; use"):
        parse_header(newer, "x")


def test_names_in_the_metadata_that_we_do_not_know_are_ignored() -> None:
    assert len(parse_header(with_json(lambda h: h["__metadata__"].update(note="hello")), "x").records) == 3


@pytest.mark.promise("hostile input")
@pytest.mark.parametrize("filler", [b"[],", b'{"":0},', b'"",', b"0,", b'{"a":[]},'])
def test_a_small_header_does_not_unfold_into_much_memory(filler: bytes) -> None:
    body = b'{"a":[' + filler * ((MAX_HEADER_BYTES - 100) // len(filler)) + b"0]}"
    data = len(body).to_bytes(8, "little") + body
    tracemalloc.start()
    try:
        with pytest.raises(ShardFormatError):
            parse_header(data, "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024


# ---------------------------------------------------------------- any bytes at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=33), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """A good header of which one part, at any depth, is replaced, dropped or doubled; then maybe a few bytes."""
    header = json.loads(make_header()[8:])
    node: Any = header
    while True:
        key = draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else None
        if key is None:
            key = draw(st.integers(0, len(node) - 1))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        break
    action = draw(st.sampled_from(["replace", "drop", "rename"]))
    if action == "replace" or isinstance(node, list):
        node[key] = draw(
            json_values | st.sampled_from([2**31, 2**63, 2**64, -1, 0, 1, "BF16", "F32", [0, 48]])
        )
    elif action == "drop":
        del node[key]
    else:
        node[draw(st.text(max_size=33) | st.just(make_key(9).hex()))] = node.pop(key)
    text = bytearray(json.dumps(header).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return len(text).to_bytes(8, "little") + bytes(text)


@settings(max_examples=400)
@given(st.binary(max_size=200) | mutated_headers())
def test_no_bytes_lead_to_anything_but_sound_records_or_a_format_error(data: bytes) -> None:
    try:
        header = parse_header(data, "x")
    except ShardFormatError:
        return
    position = 8 + int.from_bytes(data[:8], "little")
    for record in header.records:
        assert record.offset == position
        assert 1 <= record.h <= MAX_SIDE
        assert 1 <= record.w <= MAX_SIDE
        position += payload_bytes(header.spec, record.h, record.w)
    assert position == header.data_end
    assert len({record.key for record in header.records}) == len(header.records)
