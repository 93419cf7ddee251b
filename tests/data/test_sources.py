"""Where rows come from: kinds of files, directories and the hub, and what is said when they cannot be read."""

import gzip
import json
import os

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from helpsteer_rloo import hub
from helpsteer_rloo.data import sources
from helpsteer_rloo.data.helpsteer3 import load_corpus
from helpsteer_rloo.data.sources import BadRowError, RowFile, content_digest, locate, read_rows
from helpsteer_rloo.settings.knobs import DataKnobs
from tests.data.rows import make_row, turns, write_jsonl, write_parquet


def some_rows():
    return [
        make_row("Größe &lt; 3? 🌳", "oak", "elm"),
        make_row(context=turns("a", "b", "c"), overall_preference=3),
        make_row("Größe &lt; 3? 🌳", "elm", "ash", domain="stem"),
        make_row("tie", overall_preference=0),
    ]


def read(path):
    return [raw.content for raw in read_rows(RowFile(path, None))]


# ---- kinds of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows_and_groups(ending, tmp_path):
    rows, path = some_rows(), tmp_path / f"rows{ending}"
    (write_parquet if ending == ".parquet" else write_jsonl)(path, rows)
    assert read(path) == rows
    assert [raw.line for raw in read_rows(RowFile(path, None))] == [1, 2, 3, 4]
    reference = load_corpus(DataKnobs(dataset_name=str(write_jsonl(tmp_path / "reference" / "r.jsonl", rows))))
    corpus = load_corpus(DataKnobs(dataset_name=str(path)))
    assert corpus == reference
    assert corpus.counts.pairs == 3


def test_blank_lines_are_passed_over_and_lines_are_still_counted_right(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n   \n\n{"a": 2}')
    assert [(raw.line, raw.content) for raw in read_rows(RowFile(path, None))] == [(2, {"a": 1}), (5, {"a": 2})]


def test_a_byte_order_mark_at_the_start_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert read(path) == [{"a": 1}, {"a": 2}]


def test_a_row_that_cannot_be_parsed_arrives_as_an_error_and_the_rest_follows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\nnonsense\n{"a": 3}\n')
    first, error, third = read(path)
    assert (first, third) == ({"a": 1}, {"a": 3})
    assert isinstance(error, BadRowError)
    assert (error.file, error.line, error.field) == (str(path), 2, "(row)")
    assert str(error) == f"{path}, line 2, field '(row)': not JSON: Expecting value at column 1"


def test_the_column_of_a_row_that_ends_early_is_that_of_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    assert read(path)[1].reason == "not JSON: Expecting value at column 7"


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5],
        lambda whole: b"not an archive at all\n",
        lambda whole: whole[:20] + bytes(20) + whole[40:],
    ],
    ids=["truncated", "header_only", "plain_text", "overwritten"],
)
def test_a_damaged_archive_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(
        damage(gzip.compress("".join(json.dumps({"a": i, "b": "x" * i}) + "\n" for i in range(99)).encode()))
    )
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert str(caught.value).endswith("Is the file complete?")


@pytest.mark.parametrize("part", [0, 4, 100])
def test_a_damaged_parquet_file_is_refused_by_name(part, tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", some_rows())
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(ValueError, match="not a readable parquet file") as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a readable parquet file: ")


def test_a_parquet_text_that_is_not_utf8_is_refused_by_name(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    not_text = pyarrow.array([b"oak", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"response1": not_text}), path)
    with pytest.raises(ValueError, match=r"(?i)utf-?8") as caught:
        read(path)
    assert str(path) in str(caught.value)


# ---- places ----------------------------------------------------------------------------------------------------------


def names_and_splits(**knobs):
    return [(file.path.name, file.split) for file in locate(DataKnobs(**knobs))]


def test_a_single_file_has_no_split_whatever_its_name(tmp_path):
    path = write_jsonl(tmp_path / "validation.jsonl", some_rows())
    assert names_and_splits(dataset_name=str(path)) == [("validation.jsonl", None)]


def test_the_files_of_a_directory_are_taken_in_order_with_the_split_their_names_say(tmp_path):
    names = [
        "train-00001.parquet",
        "train-00000.parquet",
        "Validation.jsonl",
        "test.jsonl.gz",
        "dev.jsonl",
        "extra.jsonl",
    ]
    for name in [*names, "README.md", "train.csv", "train.json"]:
        (tmp_path / name).write_bytes(b"")
    assert names_and_splits(dataset_name=str(tmp_path)) == [
        ("Validation.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("extra.jsonl", None),
        ("test.jsonl.gz", "validation"),
        ("train-00000.parquet", "train"),
        ("train-00001.parquet", "train"),
    ]


def test_the_folder_of_the_subset_is_preferred_to_the_directory_itself(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [])
    write_jsonl(tmp_path / "preference" / "train.jsonl.gz", [])
    write_jsonl(tmp_path / "edit" / "other.jsonl", [])
    directory = str(tmp_path)
    assert names_and_splits(dataset_name=directory) == [("train.jsonl.gz", "train")]
    assert names_and_splits(dataset_name=directory, dataset_subset="edit") == [("other.jsonl", None)]
    assert names_and_splits(dataset_name=directory, dataset_subset="absent") == [("train.jsonl", "train")]


def test_a_directory_of_shards_gives_the_groups_of_one_file(tmp_path):
    rows = some_rows()
    write_jsonl(tmp_path / "shards" / "part-0.jsonl", rows[:2])
    write_parquet(tmp_path / "shards" / "part-1.parquet", rows[2:])
    whole = load_corpus(DataKnobs(dataset_name=str(write_jsonl(tmp_path / "whole.jsonl", rows))))
    assert load_corpus(DataKnobs(dataset_name=str(tmp_path / "shards"))) == whole


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="unknown file type") as caught:
        locate(DataKnobs(dataset_name=str(path)))
    assert str(caught.value) == f"{path}: unknown file type; expected one of .jsonl, .jsonl.gz, .parquet."


def test_a_directory_without_rows_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="no file of rows here") as caught:
        locate(DataKnobs(dataset_name=str(tmp_path)))
    assert str(caught.value) == (
        f"{tmp_path}: no file of rows here; expected files ending in .jsonl, .jsonl.gz, .parquet. "
        f"The first of these folders that exists is read: {tmp_path}/preference, {tmp_path}/data, {tmp_path}. "
        "Look at --dataset_name and --dataset_subset."
    )


def test_an_empty_folder_of_the_subset_is_named_and_not_passed_over(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(ValueError, match="no file of rows here") as caught:
        locate(DataKnobs(dataset_name=str(tmp_path), dataset_subset="data"))
    assert str(caught.value).startswith(f"{tmp_path}/data: no file of rows here; ")
    assert f" is read: {tmp_path}/data, {tmp_path}. " in str(caught.value), "no folder is listed twice"


def test_a_folder_named_like_a_file_of_rows_is_no_file_of_rows(tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(ValueError, match="no file of rows here"):
        locate(DataKnobs(dataset_name=str(tmp_path)))
    write_jsonl(tmp_path / "train.jsonl.gz", [])
    assert names_and_splits(dataset_name=str(tmp_path)) == [("train.jsonl.gz", "train")]


def test_a_link_to_nothing_is_kept_so_that_no_rows_are_lost_in_silence(tmp_path):
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "absent")
    (file,) = locate(DataKnobs(dataset_name=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_rows(file))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "train.jsonl.gz"),
        ("train.jsonl", "train.parquet"),
        ("a.b.jsonl.gz", "a.b.parquet"),
        ("train.jsonl", "train.jsonl.gz", "train.parquet"),
    ],
    ids="+".join,
)
def test_files_that_differ_in_their_endings_alone_are_refused(names, tmp_path):
    for name in (*names, "validation.jsonl", "train-2.jsonl"):
        (tmp_path / "preference").mkdir(exist_ok=True)
        (tmp_path / "preference" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="differ in their endings alone") as caught:
        locate(DataKnobs(dataset_name=str(tmp_path)))
    assert str(caught.value) == (
        f"{tmp_path}/preference: {' and '.join(names)} differ in their endings alone, so every row would count "
        f"{len(names)} times. Keep one of them and move the rest away, or pass one file as --dataset_name."
    )
    assert names_and_splits(dataset_name=f"{tmp_path}/preference/{names[0]}") == [(names[0], None)]


@pytest.mark.parametrize(
    ("word", "split"),
    [("train", "train"), *((word, "validation") for word in ("validation", "valid", "val", "dev", "test"))],
)
def test_a_split_is_named_by_the_first_word_of_a_file(word, split, tmp_path):
    names = ["", "-00000-of-00001", "_0", "0", ".en", " copy"]
    for name in names:
        (tmp_path / f"{word}{name}.jsonl").write_bytes(b"")
    (tmp_path / f"{word.upper()}-big.parquet").write_bytes(b"")
    found = names_and_splits(dataset_name=str(tmp_path))
    assert len(found) == len(names) + 1
    assert {of_name for _, of_name in found} == {split}


def test_a_word_that_only_begins_like_a_split_names_none(tmp_path):
    words = ["testimonials", "valuable", "developers", "trainees", "validationist", "valé", "détest", "my_train", "0"]
    for word in words:
        (tmp_path / f"{word}.jsonl").write_bytes(b"")
    assert names_and_splits(dataset_name=str(tmp_path)) == [(f"{word}.jsonl", None) for word in sorted(words)]


@pytest.mark.parametrize("name", ["rows", "data/rows.jsonl", "./data/rows", "/data/rows", "~/rows", "a/b/c", "../rows"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(name, tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    with pytest.raises(ValueError, match="no such file or directory") as caught:
        locate(DataKnobs(dataset_name=name))
    assert str(caught.value).startswith(f"--dataset_name {name}: ")


def test_a_pipe_is_refused_where_rows_are_read_more_than_once(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"--dataset_name .*rows\.jsonl: is a pipe or a device"):
        locate(DataKnobs(dataset_name=str(tmp_path / "rows.jsonl")))


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hub_that_answers(monkeypatch):
    for module in (hub, sources):
        monkeypatch.setattr(module, "absence", lambda *args: None)


def test_a_hub_that_does_not_answer_is_said_to_be_away_with_the_reason(tmp_path, monkeypatch):
    def fetch(name, **kwargs):
        assert kwargs["local_files_only"]
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.chdir(tmp_path)
    for module in (hub, sources):
        monkeypatch.setattr(module, "absence", lambda *args: "ConnectError: Name or service not known")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="from the hub: ConnectError: Name or service not known\n"):
        locate(DataKnobs())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("Cannot find the requested files.\nSecond line."), "Cannot find the requested files."),
        (ConnectionError("Network is unreachable"), "Network is unreachable"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_data_set_that_cannot_be_fetched_is_named_with_the_way_to_pass_a_local_one(
    error, reason, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="Could not fetch") as caught:
        locate(DataKnobs())
    assert str(caught.value) == (
        f"Could not fetch the data set 'nvidia/HelpSteer3' (subset 'preference') from the hub: {reason}\n"
        "Check the name and the network, or pass a local copy: --dataset_name PATH, where PATH is a directory with "
        "preference/train.jsonl.gz and preference/validation.jsonl.gz, or one file ending in "
        ".jsonl, .jsonl.gz, .parquet."
    )


def test_a_data_set_of_the_hub_is_fetched_by_subset_and_revision(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **kwargs):
        asked.update(kwargs, name=name)
        if kwargs.get("dry_run"):
            return []
        write_jsonl(tmp_path / "snapshot" / "pairs" / "train.jsonl.gz", [make_row("t")])
        write_jsonl(tmp_path / "snapshot" / "pairs" / "validation.jsonl.gz", [make_row("v")])
        return str(tmp_path / "snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    corpus = load_corpus(DataKnobs(dataset_name="owner/name", dataset_subset="pairs", dataset_revision="abc"))
    assert (asked["name"], asked["repo_type"], asked["revision"]) == ("owner/name", "dataset", "abc")
    assert asked["allow_patterns"] == ["pairs/*.jsonl", "pairs/*.jsonl.gz", "pairs/*.parquet"]
    assert "local_files_only" not in asked
    assert [len(corpus.groups[split]) for split in ("train", "validation")] == [1, 1]


def test_a_data_set_of_the_hub_without_the_subset_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kwargs: [] if kwargs.get("dry_run") else str(tmp_path / "never_made"),
    )
    with pytest.raises(ValueError, match="no file of rows here") as caught:
        locate(DataKnobs(dataset_name="owner/name", dataset_subset="pairs"))
    assert f"{tmp_path}/never_made/pairs, {tmp_path}/never_made/data, " in str(caught.value)


def test_a_local_directory_named_like_a_hub_id_wins_over_the_hub(tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    write_jsonl(tmp_path / "owner" / "name" / "rows.jsonl", [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    assert names_and_splits(dataset_name="owner/name") == [("rows.jsonl", None)]


# ---- the digest ------------------------------------------------------------------------------------------------------


def digest_of(path):
    return content_digest(locate(DataKnobs(dataset_name=str(path))))


def test_the_digest_changes_with_any_byte_and_not_with_the_place(tmp_path):
    original = write_jsonl(tmp_path / "a" / "rows.jsonl", some_rows())
    copy = write_jsonl(tmp_path / "b" / "rows.jsonl", some_rows())
    assert digest_of(original) == digest_of(copy)
    for content in (copy.read_bytes() + b"\n", copy.read_bytes().replace(b"oak", b"elm", 1), b""):
        changed = tmp_path / "c" / "rows.jsonl"
        changed.parent.mkdir(exist_ok=True)
        changed.write_bytes(content)
        assert digest_of(changed) != digest_of(original)


def test_the_digest_changes_when_rows_move_to_another_split(tmp_path):
    for name, (train, validation) in {"one": (some_rows(), []), "two": ([], some_rows())}.items():
        write_jsonl(tmp_path / name / "train.jsonl", train)
        write_jsonl(tmp_path / name / "validation.jsonl", validation)
    assert digest_of(tmp_path / "one") != digest_of(tmp_path / "two")


def test_rows_are_counted_without_being_read(tmp_path):
    rows = some_rows()
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert sources.row_count(RowFile(write_jsonl(tmp_path / name, rows), None)) == len(rows)
    write_parquet(tmp_path / "a.parquet", rows)
    assert sources.row_count(RowFile(tmp_path / "a.parquet", None)) == len(rows)
    (tmp_path / "b.jsonl").write_bytes(b"{}\n\n  \n{}\nnot json")
    assert sources.row_count(RowFile(tmp_path / "b.jsonl", None)) == 3
    assert len(list(sources.read_rows(RowFile(tmp_path / "b.jsonl", None)))) == 3
    for name in ("d.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_bytes(b"damaged")
        assert sources.row_count(RowFile(tmp_path / name, None)) == 0
