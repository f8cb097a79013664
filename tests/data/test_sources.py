import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages import FIX, assistant, error_message, row_error, user
from mixpo.data.errors import InputError
from mixpo.data.rows import Demonstration, Preference
from mixpo.data.sources import (
    Format,
    compute_content_digest,
    compute_source_identity,
    expand_home,
    guess_format,
    parse_hh_rlhf,
    parse_tldr,
    read_demonstrations,
    read_hub_demonstrations,
    read_hub_preferences,
    read_hub_records,
    read_preferences,
    read_records,
)

ROWS = [
    {"prompt": 'Say "hi",\nplease', "chosen": "hi\r\n", "rejected": "no\u2028\x85"},
    {"prompt": "Größe?", "chosen": "日本\t語", "rejected": "a,b;'"},
]
PREFERENCES = [Preference(**row) for row in ROWS]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(prompts):
    """The bytes of a Parquet file with one column."""
    stream = io.BytesIO()
    pq.write_table(pa.table({"prompt": prompts}), stream)
    return stream.getvalue()


def write(path: Path, rows):
    """Write rows to a file in the format of its suffix."""
    plain = path.with_name(path.name.removesuffix(".gz"))
    match plain.suffix.lower():
        case ".jsonl":
            plain.write_bytes(jsonl(rows))
        case ".json":
            plain.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            with plain.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([rows[0], *([row[name] for name in rows[0]] for row in rows)])
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), plain)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "A.JSONL", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert read_preferences(write(tmp_path / name, ROWS), "preference")[:2] == (PREFERENCES, [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_messages_are_read(tmp_path, name):
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    expected = Demonstration([user("a"), assistant("b"), user("c")], "d")
    assert read_demonstrations(write(tmp_path / name, [row]))[:2] == ([expected], [])


text = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.fixed_dictionaries({"prompt": text, "completion": text}), min_size=1, max_size=4))
def test_any_text_is_read_unchanged_from_any_kind_of_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    expected = [Demonstration(**row) for row in rows]
    for name in ("a.jsonl.gz", "a.csv", "a.json", "a.parquet"):
        assert read_demonstrations(write(folder / name, rows))[:2] == (expected, []), name


def test_rows_are_numbered_by_line_or_position(tmp_path):
    for name, numbers in {"a.jsonl": [1, 2], "a.json": [1, 2], "a.parquet": [1, 2], "a.csv": [2, 5]}.items():
        assert [number for number, _ in read_records(write(tmp_path / name, ROWS))] == numbers, name


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": 1}\n \r\n{"a": 2}')
    assert list(read_records(path)) == [(2, {"a": 1}), (4, {"a": 2})]


def test_a_byte_order_mark_is_skipped(tmp_path):
    for name, content in {"a.jsonl": '{"a": "1"}', "a.csv": "a\n1\n"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [row for _, row in read_records(tmp_path / name)] == [{"a": "1"}], name


def test_bad_rows_are_returned_beside_the_good_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    good = jsonl(ROWS[:1]).decode().strip()
    empty = json.dumps(ROWS[0] | {"rejected": ""})
    deep = "[" * 100_000
    path.write_text("\n".join([good, '{"prompt": "a" "b"}', "[1]", empty, deep, "1" * 5000, good]), encoding="utf-8")
    rows, bad, *_ = read_preferences(path, "preference")
    assert rows == [PREFERENCES[0]] * 2
    lines = [str(row) for row in bad]
    assert lines[:3] == [
        f"{path}:2: the row is not JSON: Expecting ',' delimiter at column 16; {FIX}",
        f"{path}:3: the row is a list; expected an object; {FIX}",
        f"{path}:4: 'rejected' is empty; {FIX}",
    ]
    assert lines[3].startswith(f"{path}:5: the row is not JSON: maximum recursion depth")
    assert lines[4].startswith(f"{path}:6: the row is not JSON: Exceeds the limit")


def test_json_lists_may_hold_bad_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], "text"]), encoding="utf-8")
    rows, bad, *_ = read_preferences(path, "preference")
    assert rows == PREFERENCES[:1]
    assert [str(row) for row in bad] == [f"{path}:2: the row is text; expected an object; {FIX}"]


def test_csv_rows_with_other_columns_than_the_header_are_bad(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected\na,"b\nb",c\na,b\n\na,b,c,d\n', encoding="utf-8")
    rows, bad, *_ = read_preferences(path, "preference")
    assert rows == [Preference("a", "b\nb", "c")]
    assert [str(row) for row in bad] == [
        f"{path}:4: the row has 2 columns; expected 3 as in the header; quote texts with commas",
        f"{path}:6: the row has 4 columns; expected 3 as in the header; quote texts with commas",
    ]


def test_a_repeated_key_makes_a_bad_row(tmp_path):
    good = jsonl(ROWS[:1]).decode().strip()
    twice = f'{good[:-1]}, "rejected": "again"}}'
    nested = '{"messages": [{"role": "user", "role": "user", "content": "a"}], "id": 1}'
    for name, content in {"a.jsonl": f"{twice}\n{good}\n{nested}", "a.json": f"[{twice}, {good}, {nested}]"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        rows, bad, *_ = read_preferences(tmp_path / name, "preference")
        assert rows == PREFERENCES[:1]
        assert [str(row) for row in bad] == [
            f"{tmp_path / name}:1: 'rejected' occurs twice in one object; expected one value; {FIX}",
            f"{tmp_path / name}:3: 'role' occurs twice in one object; expected one value; {FIX}",
        ]
    (tmp_path / "b.json").write_text(twice, encoding="utf-8")
    assert error_message(read_records, tmp_path / "b.json").endswith(
        "b.json: contains an object; expected a list of objects"
    )


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,chosen\na,b,c,d\n", encoding="utf-8")
    assert error_message(read_records, path) == (
        f"{path}:1: the header has two columns 'chosen'; expected different names; rename one of them"
    )


def test_csv_cells_may_be_long(tmp_path):
    row = {"prompt": "a" * 200_000, "completion": "b"}
    assert read_demonstrations(write(tmp_path / "a.csv", [row]))[:2] == ([Demonstration(**row)], [])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("helpfull.jsonl", "no such file; did you mean 'helpful.txt'?"),
        ("tldr", "no such file; the folder holds 'empty', 'full', 'helpful.txt'"),
        ("no/a.jsonl", "no such file, and no folder '{folder}/no'; check the path"),
        ("empty", "is a folder; expected a file; it holds nothing"),
        (
            "full",
            f"is a folder; expected a file; it holds {str([f'{n:02}.jsonl' for n in range(10)])[1:-1]} and 2 more",
        ),
        (
            "helpful.txt",
            "unsupported suffix '.txt'; expected .jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz, .parquet; "
            "convert the file",
        ),
    ],
)
def test_a_path_that_is_no_data_file_is_refused(tmp_path, name, problem):
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    for file in ("helpful.txt", *(f"full/{number:02}.jsonl" for number in range(12))):
        (tmp_path / file).touch()
    assert error_message(read_records, tmp_path / name) == f"{tmp_path / name}: {problem.format(folder=tmp_path)}"


def test_pipes_devices_and_broken_links_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    expected = "expected a regular file, because it is read more than once"
    for call in (read_records, lambda path: compute_content_digest([path])):
        assert error_message(call, tmp_path / "a.jsonl") == f"{tmp_path / 'a.jsonl'}: is a pipe or a device; {expected}"
        assert error_message(call, Path("/dev/null")) == f"/dev/null: is a pipe or a device; {expected}"
        found = error_message(call, tmp_path / "b.jsonl")
        assert found == f"{tmp_path / 'b.jsonl'}: is a link to a missing file; {expected}"


def test_an_unknown_user_in_a_path_is_refused():
    name = "~no-such-user-of-this-machine/a.jsonl"
    expected = f"{name}: found no home folder of that user; expected an existing user; write the full path"
    assert error_message(expand_home, name) == expected
    assert expand_home("~/a.jsonl") == Path.home() / "a.jsonl"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", parquet(pa.array([], pa.string()))),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json", b""),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"prompt,completion\n"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_message(read_records, path) == f"{path}: has no rows; expected at least one; check the file"


COMPLETE = gzip.compress(jsonl(ROWS * 50), mtime=0)
NOT_UTF8 = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))


BROKEN_FILES = {
    "not UTF-8": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "\xff"}\n',
        ":2: is not UTF-8: byte 0xff at position 8; save the file as UTF-8",
    ),
    "CSV not UTF-8": (
        "a.csv",
        "a\nä".encode("latin-1"),
        ":2: is not UTF-8: byte 0xe4 at position 1; save the file as UTF-8",
    ),
    "truncated gzip": (
        "a.jsonl.gz",
        COMPLETE[:-20],
        ": cannot be read: Compressed file ended before the end-of-stream marker was reached; "
        "check that the file is complete",
    ),
    "not gzip": ("a.jsonl.gz", b"{}", ": cannot be read: Not a gzipped file (b'{}'); check that the file is complete"),
    "JSON Lines named JSON": (
        "a.json",
        b'{"a": 1}\n{"a": 2}\n',
        ": is not JSON: Extra data: line 2 column 1 (char 9); name a file with one object per line .jsonl",
    ),
    "JSON object": ("a.json", b'{"a": 1}', ": contains an object; expected a list of objects"),
    "open quote": ("a.csv", b'a,b\n1,"2\n', ":2: is not CSV: unexpected end of data; fix the quotes around this line"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_refused(tmp_path, kind):
    name, content, message = BROKEN_FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    assert error_message(read_records, path) == f"{path}{message}"


@pytest.mark.parametrize(
    ("name", "content", "library_message"),
    [
        ("a.jsonl.gz", COMPLETE[:20] + b"\xff" * 20 + COMPLETE[40:], ""),
        ("a.parquet", b"prompt,completion", "Parquet magic bytes not found"),
        ("a.parquet", parquet(NOT_UTF8), "'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["damaged gzip", "not Parquet", "Parquet not UTF-8"],
)
def test_what_the_library_says_of_a_broken_file_is_one_line(tmp_path, name, content, library_message):
    path = tmp_path / name
    path.write_bytes(content)
    start, end = re.escape(f"{path}: cannot be read: {library_message}"), "; check that the file is complete"
    assert re.fullmatch(f"{start}.*{end}", error_message(read_records, path))


# HH-RLHF


HH_RLHF_DIALOGUES = {
    "stripped": (
        "\n\nHuman: Hi \n\nAssistant:",
        "  Hello.\n",
        " Go away.",
        Preference([user("Hi")], "Hello.", "Go away."),
    ),
    "markers inside text": (
        "\n\nHuman: Human: a\nAssistant: b\n\n Human: c\n\nhuman: d\n\nAssistant:",
        " Human: e\n\nf",
        " g",
        Preference([user("Human: a\nAssistant: b\n\n Human: c\n\nhuman: d")], "Human: e\n\nf", "g"),
    ),
    "turns of one side are one": (
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:",
        " f",
        " g",
        Preference([user("a\n\nb"), assistant("c\n\nd"), user("e")], "f", "g"),
    ),
    "a completion in two turns": (
        "\n\nHuman: a\n\nAssistant:",
        " One moment.\n\nAssistant: b",
        " c",
        Preference([user("a")], "One moment.\n\nb", "c"),
    ),
    "an empty turn beside one of its side": (
        "\n\nHuman:\n\nHuman: a\n\nAssistant:",
        " b\n\nAssistant:",
        " c",
        Preference([user("a")], "b", "c"),
    ),
}


@pytest.mark.parametrize("kind", HH_RLHF_DIALOGUES)
def test_hh_rlhf_dialogues(kind):
    start, chosen, rejected, expected = HH_RLHF_DIALOGUES[kind]
    assert parse_hh_rlhf({"chosen": start + chosen, "rejected": start + rejected}) == expected


A = "\n\nHuman: a\n\nAssistant: b"
EXPECTED_START = f"expected '\\n\\nHuman:'; {FIX}"


@pytest.mark.parametrize(
    ("record", "field", "problem"),
    [
        ({"chosen": A}, "rejected", f"is missing; found 'chosen'; {FIX}"),
        ({"chosen": A, "rejected": [user("a")]}, "rejected", f"is a list; expected text; {FIX}"),
        ({"chosen": A, "rejected": " "}, "rejected", f"is empty; {FIX}"),
        ({"chosen": f"Hello{A}", "rejected": A}, "chosen", f"begins with {f'Hello{A}'!r}; {EXPECTED_START}"),
        ({"chosen": "x" * 50, "rejected": A}, "chosen", f"begins with '{'x' * 40}…'; {EXPECTED_START}"),
        (
            {"chosen": "\n\nAssistant: b", "rejected": A},
            "chosen",
            f"begins with '\\n\\nAssistant: b'; {EXPECTED_START}",
        ),
        ({"chosen": A, "rejected": A.removesuffix(" b")}, "rejected", f"message 2 'content' is empty; {FIX}"),
        ({"chosen": "\n\nHuman:\n\nAssistant: b", "rejected": A}, "chosen", f"message 1 'content' is empty; {FIX}"),
        ({"chosen": A, "rejected": A}, "rejected", f"equals 'chosen'; expected two different completions; {FIX}"),
    ],
)
def test_bad_hh_rlhf_rows(record, field, problem):
    assert row_error(parse_hh_rlhf, record) == (field, problem)


turns = st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), min_size=1).map(str.strip), min_size=1)


@given(turns.filter(all), text.map(str.strip), text.map(str.strip))
def test_hh_rlhf_written_and_parsed(texts, chosen, rejected):
    prompt = [message for turn in texts for message in (user(turn), assistant(turn + "!"))][:-1]
    start = "".join(("\n\nHuman: " if m["role"] == "user" else "\n\nAssistant: ") + m["content"] for m in prompt)
    if chosen != rejected:
        start += "\n\nAssistant: "
        assert parse_hh_rlhf({"chosen": start + chosen, "rejected": start + rejected}) == Preference(
            prompt, chosen, rejected
        )


# TL;DR

POST = "SUBREDDIT: r/tifu TITLE: Me POST: I did.\n\nIt broke."


@pytest.mark.parametrize("ending", ["", "\n", "\n\nTL;DR:", "\nTL;DR: "])
@pytest.mark.parametrize("prefix", ["TL;DR:  ", "TL;DR:", " ", ""])
def test_tldr_rows(ending, prefix):
    record = {"prompt": POST + ending, "chosen": f"{prefix}Broke it.", "rejected": f"{prefix}I did TL;DR: it. \n"}
    assert parse_tldr(record) == Preference([user(f"{POST}\n\nTL;DR:")], "Broke it.", "I did TL;DR: it.")


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"chosen": "TL;DR: "}, "chosen", f"is empty; {FIX}"),
        ({"chosen": None}, "chosen", f"is null; expected text; {FIX}"),
        ({"chosen": "TL;DR: b"}, "rejected", f"equals 'chosen'; expected two different completions; {FIX}"),
        ({"prompt": "Why?"}, "prompt", f"is 'Why?'; expected 'SUBREDDIT: … TITLE: … POST: …'; {FIX}"),
    ],
)
def test_bad_tldr_rows(change, field, problem):
    record = {"prompt": POST, "chosen": "TL;DR: a", "rejected": "TL;DR: b"}
    assert row_error(parse_tldr, record | change) == (field, problem)


@pytest.mark.parametrize(
    ("format", "folder", "category"),
    [
        ("hh-rlhf", "harmless-base", "harmless"),
        ("hh-rlhf", "helpful-rejection-sampled", "helpful"),
        ("hh-rlhf", "helpful", None),
        ("preference", "harmless-base", None),
    ],
)
def test_the_folder_of_hh_rlhf_is_the_category(tmp_path, format, folder, category):
    (tmp_path / folder).mkdir()
    row = {"chosen": A, "rejected": A + "c"} if format == "hh-rlhf" else {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows, bad, *_ = read_preferences(write(tmp_path / folder / "a.jsonl", [row]), format)
    assert ([row.category for row in rows], bad) == ([category], [])


def test_suffix_and_category_are_part_of_a_files_identity(tmp_path):
    def identity(name, format="hh-rlhf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("same")
        return compute_source_identity(tmp_path / name, format)

    mine = identity("mine/a.jsonl")
    assert mine == identity("yours/b.JSONL")
    assert len({mine, identity("harmless-base/a.jsonl"), identity("helpful-base/a.jsonl"), identity("mine/a.csv")}) == 4
    assert identity("helpful-base/a.jsonl") == identity("helpful-online/a.jsonl")  # one category
    assert identity("harmless-base/a.jsonl", "preference") == identity("mine/a.jsonl", "preference")


SIDES = ["chosen", "rejected"]
FORMAT_ROWS = [
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, ["prompt", *SIDES], Preference("a", "b", "c")),
    ("hh-rlhf", {"chosen": A, "rejected": A + "c", "prompt": "a"}, SIDES, Preference([user("a")], "b", "bc")),
    (
        "tldr",
        {"prompt": POST, "chosen": "TL;DR: a", "rejected": "b", "system": "c"},
        ["prompt", *SIDES],
        Preference([user(f"{POST}\n\nTL;DR:")], "a", "b"),
    ),
    ("demonstrations", {"prompt": "a", "completion": "b"}, ["prompt", "completion"], Demonstration("a", "b")),
]


@pytest.mark.parametrize(("format", "row", "used", "expected"), FORMAT_ROWS)
def test_files_are_read_in_their_format_and_their_columns_named(tmp_path, format, row, used, expected):
    path = write(tmp_path / "a.jsonl", [{**row, "id": 3}, {**row, "score": 0.5}])
    parsed = read_demonstrations(path) if format == "demonstrations" else read_preferences(path, format)
    assert parsed[:2] == ([expected] * 2, [])
    assert parsed.used_columns == used
    assert set(parsed.ignored_columns) == {*row, "id", "score"} - set(used)
    assert guess_format(row) == format


def test_every_format_has_its_row_in_the_table():
    assert {row[0] for row in FORMAT_ROWS} == {*get_args(Format), "demonstrations"}


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose one data set has one good and one bad row; returns the calls."""
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        if options["split"] != "train":
            raise ValueError("Unknown split \"tran\".\nShould be one of ['train'].")
        return [
            {"chosen": A, "rejected": A + "c", "prompt": "a", "completion": "b"},
            {"chosen": A, "rejected": "", "prompt": "a", "completion": ""},
        ]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_preferences(hub):
    rows, bad, *_ = read_hub_preferences("Anthropic/hh-rlhf", "hh-rlhf", split="train", data_dir="helpful-base")
    assert rows == [Preference([user("a")], "b", "bc", "helpful")]
    assert [str(row) for row in bad] == [f"Anthropic/hh-rlhf/helpful-base[train]:2: 'rejected' is empty; {FIX}"]
    assert hub == [("Anthropic/hh-rlhf", {"split": "train", "data_dir": "helpful-base", "revision": None})]


def test_hub_demonstrations(hub):
    rows, bad, *_ = read_hub_demonstrations("some/set", split="train", revision="abc")
    assert rows == [Demonstration("a", "b")]
    assert [str(row) for row in bad] == [f"some/set[train]:2: 'completion' is empty; {FIX}"]
    assert hub == [("some/set", {"split": "train", "data_dir": None, "revision": "abc"})]


def test_a_hub_data_set_that_cannot_be_loaded(hub):
    with pytest.raises(InputError) as caught:
        read_hub_records("some/set", split="tran")
    assert str(caught.value) == (
        "Hub data set 'some/set[tran]' cannot be loaded: ValueError: Unknown split \"tran\".; "
        "check its name, split, data_dir and the network, or name a local file"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_message(read_hub_records, "some/set", split="train") == (
        "Hub data set 'some/set' needs the package 'datasets'; pip install 'mixpo[hub]'"
    )


# Digests


def test_a_digest_is_of_contents_in_order(tmp_path):
    names = ["a", "b", "c", "ab", "empty"]
    a, b, c, ab, empty = (tmp_path / name for name in names)
    for path, content in zip((a, b, c, ab, empty), ("1", "2", "1", "12", ""), strict=True):
        path.write_text(content)
    assert compute_content_digest([a, b]) == compute_content_digest([c, b])
    different = [[a, b], [b, a], [ab], [a], [ab, empty], [empty], []]
    assert len({compute_content_digest(paths) for paths in different}) == len(different)
    each = [hashlib.sha256(content).digest() for content in (b"1", b"2")]
    assert compute_content_digest([a, b]) == hashlib.sha256(b"".join(each)).hexdigest()[:16]


def test_a_digest_needs_its_files(tmp_path):
    missing = tmp_path / "a"
    assert error_message(compute_content_digest, [missing]) == f"{missing}: no such file; the folder holds nothing"
