"""The documents: both languages say the same, what they name exists, and their figures are those of the results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vggt_cache import codec
from vggt_cache.cli import build_parser, main
from vggt_cache.frames import frame_grid
from vggt_cache.identity import Preprocessing

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {
    "README.md": "README.zh-CN.md",
    "docs/guide.md": "docs/guide.zh.md",
    "docs/performance.md": "docs/performance.zh.md",
    "docs/differences.md": "docs/differences.zh.md",
    "docs/evaluation.md": "docs/evaluation.zh.md",
    "docs/own_trainer.md": "docs/own_trainer.zh.md",
    "docs/consumers.md": "docs/consumers.zh.md",
    "docs/recipes.md": "docs/recipes.zh.md",
    "docs/identity.md": "docs/identity.zh.md",
    "docs/object_stores.md": "docs/object_stores.zh.md",
    "docs/where_caches_live.md": "docs/where_caches_live.zh.md",
    "docs/precompute_cluster.md": "docs/precompute_cluster.zh.md",
}
READMES, GUIDES = (pair for pair in list(PAIRS.items())[:2])
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    if "assets" not in path.parts
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@dataclass
class Section:
    """A heading and what stands below it, up to the next heading."""

    heading: str
    prose: str = ""
    blocks: list[str] = field(default_factory=list)


def sections(text: str) -> list[Section]:
    found, in_block = [Section("")], False
    for line in text.splitlines():
        if line.startswith("```"):
            in_block = not in_block
            if in_block:
                found[-1].blocks.append("")
        elif in_block:
            found[-1].blocks[-1] += line + "\n"
        elif line.startswith("#"):
            found.append(Section(line))
        else:
            found[-1].prose += line + "\n"
    return found


def uncommented(block: str) -> list[str]:
    return [re.sub(r"(^|\s+)#\s.*", "", line).rstrip() for line in block.splitlines()]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def in_english(link: str) -> str:
    """The link without its place in the page, to the English page of the pair."""
    return link.partition("#")[0].replace(".zh-CN.md", ".md").replace(".zh.md", ".md")


# ---------------------------------------------------------------- two languages


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_both_languages_have_the_same_sections(english: str, chinese: str) -> None:
    """Levels and numbers of the headings, and the code in them."""

    def marks(name: str) -> list[list[str]]:
        return [re.findall(r"^#+|\d+\.|`[^`]+`", section.heading) for section in sections(text_of(name))]

    assert marks(english) == marks(chinese)


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_both_languages_show_the_same_commands_and_output(english: str, chinese: str) -> None:
    ours, theirs = ([section.blocks for section in sections(text_of(name))] for name in (english, chinese))
    assert [list(map(uncommented, blocks)) for blocks in ours] == [
        list(map(uncommented, blocks)) for blocks in theirs
    ]


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_both_languages_name_the_same_flags_files_and_figures_in_each_section(
    english: str, chinese: str
) -> None:
    for ours, theirs in zip(sections(text_of(english)), sections(text_of(chinese)), strict=True):
        for pattern in (r"`[^`]+`", r"\d+(?:[.,]\d+)*"):
            found, other = (set(re.findall(pattern, one.prose)) for one in (ours, theirs))
            assert found == other, (ours.heading, found ^ other)
        assert set(map(in_english, links(ours.prose))) - {"README.md"} == set(
            map(in_english, links(theirs.prose))
        ) - {"README.md"}, ours.heading
        assert ours.prose.count("\n|") == theirs.prose.count("\n|"), ours.heading


@pytest.mark.parametrize("name", PAIRS.values())
def test_chinese_pages_have_one_word_for_shards_and_codecs(name: str) -> None:
    prose = re.sub(
        r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "", "".join(section.prose for section in sections(text_of(name)))
    )
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("| safetensors, shards"))
    assert not re.findall(r"(?i)\bshards?\b|\bcodecs?\b", prose)


# ---------------------------------------------------------------- what they name


def test_the_readmes_are_at_most_200_lines() -> None:
    assert {name: lines for name in READMES if (lines := len(text_of(name).splitlines())) > 200} == {}


def anchors(text: str) -> set[str]:
    """As GitHub names the headings of a page."""
    return {
        re.sub(r"[^\w\- ]", "", section.heading.lstrip("# ").lower()).replace(" ", "-")
        for section in sections(text)
    }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in links("".join(section.prose for section in sections(text_of(name)))):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", READMES)
def test_every_command_is_in_both_readmes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^    (\w+)\b", help_of(capsys), re.MULTILINE)
    assert len(commands) >= 7
    assert [one for one in commands if f"vggt-cache {one}" not in text_of(name)] == []


@pytest.mark.parametrize("name", GUIDES)
def test_every_flag_of_precompute_is_in_both_guides(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"--[a-z]+(?:_[a-z]+)*\b", help_of(capsys, "precompute"))) - {"--help", "--no"}
    assert len(flags) > 20
    table = re.findall(r"^\| (`--.*?) \|", text_of(name), re.MULTILINE)
    assert {one for one in flags if not any(one.replace("--no-", "--") in row for row in table)} == set()


def precompute_commands() -> Iterator[tuple[str, list[str]]]:
    """Name of the document and arguments of each command of precompute that a document shows."""
    for name in DOCUMENTS:
        for section in sections(text_of(name)):
            for block in section.blocks:
                for line in block.replace("\\\n", " ").splitlines():
                    _, script, arguments = line.partition("scripts/precompute_vggt_features.py")
                    if script and line.startswith(("python", "CUDA")):
                        yield name, shlex.split(arguments.rstrip(" &"))


def test_the_commands_of_precompute_that_the_documents_show_are_understood() -> None:
    commands = list(precompute_commands())
    assert {name for name, _ in commands} >= {*READMES, *GUIDES}
    for name, arguments in commands:
        understood = build_parser().parse_args(["precompute", *arguments])
        assert understood.cache_dir, (name, arguments)


@pytest.mark.parametrize("name", GUIDES)
def test_every_variable_that_the_guides_name_is_one_of_the_scripts(name: str) -> None:
    known = "".join(
        path.read_text() for folder in ("scripts", "src") for path in (ROOT / folder).rglob("*.*h")
    )
    known += "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"`\$?([A-Z][A-Z0-9_]{2,})(?:=[^`]*)?`", text_of(name)))
    assert len(named) > 40
    assert {one for one in named if one not in known} - {"PYTHONPATH"} == set()


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_say_which_packages_are_installed(name: str) -> None:
    project = text_of("pyproject.toml")
    lists = re.findall(
        r"^(dependencies|codec|train|cloud|ray) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL
    )
    assert len(lists) == 5
    wanted = {package for _, packages in lists for package in re.findall(r'"([^"]+)"', packages)}
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    assert {one for one in wanted if f"`{one}`" not in text_of(name)} == set()
    assert f"Python {oldest}" in text_of(name)


# ---------------------------------------------------------------- figures


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import table

    return table


def test_the_documents_figures_are_those_of_the_results() -> None:
    script = ROOT / "benchmarks" / "table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_of_the_figures_sees_a_changed_result(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tables.newest_results()
    (step,) = (one for one in results if one["theme"] == "step")
    step["figures"]["cached_over_resident"] += 0.1
    monkeypatch.setattr(tables, "newest_results", lambda: results)
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    assert tables.main() == 1


def test_the_readmes_have_ten_headlines_in_both_languages(tables: Any) -> None:
    results = tables.newest_results()
    assert {len(tables.headlines(results, language)) - 2 for language in ("en", "zh")} == {10}
    for name in READMES:
        assert text_of(name).count("\n| ") >= 10


def test_a_gpus_result_goes_before_a_newer_one_of_a_cpu(tables: Any) -> None:
    def result(gpu: str | None, date: str) -> dict[str, Any]:
        return {"theme": "step", "machine": {"gpu": gpu}, "date": date}

    old, new = result("NVIDIA H100", "2026-11-01"), result(None, "2026-11-20")
    assert tables.one_of_each_theme([old, new])["step"] is old
    assert tables.one_of_each_theme([result(None, "2026-11-01"), new])["step"] is new


@pytest.mark.parametrize("width", [518, 644])
def test_the_disk_table_counts_as_the_product_does(tables: Any, width: int) -> None:
    disk = tables.table_disk
    h, w = disk.grid(width)
    assert (h, w) == frame_grid(*disk.FRAME_PIXELS, Preprocessing(image_size=width))
    assert disk.feature_bytes(width) == h * w * 2048 * 2
    assert codec.codec_for(codec.INT8).size_limits(h * w, disk.CHANNELS) == (disk.int8_bytes(width),) * 2


def test_the_way_of_a_feature_in_contributing_names_ten_files_that_exist() -> None:
    steps = re.findall(r"^\d+\. `([^`]+)`", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert 8 <= len(steps) <= 10
    assert [name for name in steps if not (ROOT / "src" / name).is_file()] == []
