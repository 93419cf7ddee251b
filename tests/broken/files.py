"""Broken files and directories of rows: archives, encodings, schemas, and what is no file at all."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.broken.corpus import Broken, Place, file_case
from tests.data.rows import make_row, write_jsonl, write_parquet

TEXT = "".join(json.dumps(make_row(f"p{n}")) + "\n" for n in range(40)).encode()
ARCHIVE = gzip.compress(TEXT, mtime=0)
INCOMPLETE = "Is the file complete?"


def parquet_of(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def parquet_of_columns(**columns: object) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def far_future() -> bytes:
    """A column with a date that Python has no object for."""
    import pyarrow

    ages = pyarrow.array([2**62], pyarrow.timestamp("us"))
    return parquet_of_columns(domain=["general"], created=ages)


def prompts_as_map() -> bytes:
    import pyarrow

    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    rest = {name: [value] for name, value in make_row().items() if name not in ("context", "individual_preference")}
    return parquet_of_columns(context=pyarrow.array([[("role", "user")]], kind), **rest)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def at(name: str, prepare: Callable[[Path], object], *says: str, target: str = "set", more: tuple = ()) -> Broken:
    """A data set whose directory `set` was prepared so."""

    def make(place: Place) -> list[str]:
        (place.root / "set").mkdir()
        prepare(place.root / "set")
        return [*place.data(place.root / target), *more]

    return Broken(name, "data", make, says)


def named(name: str, argument: str, *says: str) -> Broken:
    return Broken(name, "data", lambda place: place.data(argument), says)


def file_in_a_way(folder: Path) -> None:
    (folder / "preference").write_text("not a directory")


CASES = [
    file_case("empty", "rows.jsonl", b"", "no usable preference pair among 0 rows (the files are empty)"),
    file_case("blank_lines_only", "rows.jsonl", b"\n \n\t\n", "among 0 rows (the files are empty)"),
    file_case("empty_archive", "rows.jsonl.gz", b"", "(the files are empty)"),
    file_case("archive_cut_short", "rows.jsonl.gz", ARCHIVE[: len(ARCHIVE) // 2], "cannot be read", INCOMPLETE),
    file_case("archive_of_a_header_only", "rows.jsonl.gz", ARCHIVE[:7], "cannot be read", INCOMPLETE),
    file_case("archive_without_its_checksum", "rows.jsonl.gz", ARCHIVE[:-6], "cannot be read", INCOMPLETE),
    file_case("archive_with_a_wrong_checksum", "rows.jsonl.gz", flipped(ARCHIVE, -8), "CRC check failed"),
    file_case("archive_with_a_wrong_length", "rows.jsonl.gz", flipped(ARCHIVE, -4), "Incorrect length of data"),
    file_case("archive_overwritten_inside", "rows.jsonl.gz", ARCHIVE[:30] + bytes(20) + ARCHIVE[50:], "cannot be read"),
    file_case("archive_with_rubbish_behind_it", "rows.jsonl.gz", ARCHIVE + b"rubbish", "Not a gzipped file"),
    file_case("text_called_an_archive", "rows.jsonl.gz", TEXT, "Not a gzipped file"),
    file_case("archive_called_text", "rows.jsonl", ARCHIVE, "looks like a gzip archive", "rename it or convert it"),
    file_case("parquet_called_text", "rows.jsonl", parquet_of([make_row()]), "looks like a parquet file"),
    file_case("zip_called_text", "rows.jsonl", b"PK\x03\x04" + bytes(30), "looks like a zip archive"),
    file_case("utf_16", "rows.jsonl", TEXT.decode().encode("utf-16"), "looks like UTF-16", "convert it"),
    file_case("utf_16_big_endian", "rows.jsonl", b"\xfe\xff" + TEXT.decode().encode("utf-16-be"), "looks like UTF-16"),
    file_case("latin_1_archive", "rows.jsonl.gz", gzip.compress(TEXT.replace(b"elm", b"\xe4lm")), "not UTF-8: "),
    file_case("byte_order_mark_in_the_middle", "rows.jsonl", TEXT + b"\xef\xbb\xbf" + TEXT, "line 41", "not JSON"),
    file_case("a_list_of_rows_over_many_lines", "rows.jsonl", json.dumps([make_row()], indent=1).encode(), "line 1"),
    file_case(
        "only_a_bomb_of_zeros", "rows.jsonl.gz", gzip.compress(bytes(100_000_000)), "line 1", "longer than 64 MiB"
    ),
    file_case("parquet_cut_short", "rows.parquet", parquet_of([make_row()])[:-9], "not a readable parquet file"),
    file_case("parquet_empty", "rows.parquet", b"", "not a readable parquet file"),
    file_case(
        "parquet_of_another_schema",
        "rows.parquet",
        parquet_of_columns(text=["a"], label=[1]),
        "line 1, field 'domain': missing",
    ),
    file_case("parquet_without_rows", "rows.parquet", parquet_of([make_row()][:0]), "(the files are empty)"),
    file_case("parquet_of_a_far_future", "rows.parquet", far_future(), "not a readable parquet file"),
    file_case("parquet_with_prompts_as_map", "rows.parquet", prompts_as_map(), "'context[0]': expected an object"),
    file_case(
        "parquet_overwritten_inside",
        "rows.parquet",
        parquet_of([make_row(f"{n}") for n in range(99)]).replace(b"p", b"\xff"),
        "rows.parquet",
    ),
    file_case("text_called_parquet", "rows.parquet", TEXT, "not a readable parquet file"),
    file_case("another_ending", "rows.csv", b"domain,language\n", "unknown file type; expected one of .jsonl"),
    file_case("another_compression", "rows.jsonl.zst", b"\x28\xb5\x2f\xfd", "unknown file type"),
    named("nothing_there", "./absent.jsonl", "--dataset_name ./absent.jsonl: no such file or directory"),
    named("a_word", "preferences", "--dataset_name preferences: no such file or directory"),
    named("a_name_too_long", "a" * 5000, "--dataset_name aaa", "no such file or directory"),
    named("the_null_device", "/dev/null", "--dataset_name /dev/null: is a pipe or a device"),
    at("an_empty_directory", lambda folder: None, "{root}/set: no file of rows here", "Look at --dataset_name"),
    at("files_of_another_kind", lambda folder: (folder / "data.arrow").write_bytes(b"x"), "no file of rows here"),
    at("directories_where_files_are_expected", lambda folder: (folder / "train.jsonl").mkdir(), "no file of rows here"),
    at(
        "one_file_in_two_formats",
        lambda folder: [write_jsonl(folder / f"train.{e}", []) for e in ("jsonl", "jsonl.gz")],
        "{root}/set: train.jsonl and train.jsonl.gz differ in their endings alone",
    ),
    at("a_link_to_nothing", lambda folder: (folder / "train.jsonl").symlink_to("absent"), "{root}/set/train.jsonl: "),
    at("a_link_to_itself", lambda folder: (folder / "train.jsonl").symlink_to("train.jsonl"), "{root}/set/train.jsonl"),
    at(
        "a_directory_that_links_to_itself",
        lambda folder: (folder / "loop").symlink_to("loop"),
        "{root}/set/loop: no such file or directory",
        target="set/loop",
    ),
    at("a_pipe", lambda folder: os.mkfifo(folder / "train.jsonl"), "{root}/set/train.jsonl: is no file of rows"),
    at(
        "a_device",
        lambda folder: (folder / "train.jsonl").symlink_to("/dev/zero"),
        "{root}/set/train.jsonl: is no file",
    ),
    at("a_file_where_the_subset_is_expected", file_in_a_way, "{root}/set: no file of rows here"),
    at("no_training_rows", lambda folder: write_jsonl(folder / "train.jsonl", []), "(the files are empty)"),
    at(
        "languages_that_are_not_there",
        lambda folder: write_jsonl(folder / "train.jsonl", [make_row()]),
        "no usable preference pair among 1 rows (1 language)",
        "Look at --language (now klingon)",
        more=("--language=klingon",),
    ),
    at("ties_only", lambda folder: write_jsonl(folder / "train.jsonl", [make_row(overall_preference=0)]), "1 tie"),
    at(
        "bad_rows_only_and_skipped",
        lambda folder: write_jsonl(folder / "train.jsonl", [make_row(first=1)]),
        "1 response1: expected a string, got int",
        more=("--skip_bad_rows",),
    ),
    at(
        "good_file_beside_a_damaged_one",
        lambda folder: [
            write_parquet(folder / "train-0.parquet", [make_row()]),
            (folder / "train-1.jsonl.gz").write_bytes(ARCHIVE[:99]),
        ],
        "{root}/set/train-1.jsonl.gz: cannot be read",
    ),
]
