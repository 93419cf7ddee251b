"""Damaged records of a run: markers of stages, directories that belong to somebody else, and what is in the way."""

from collections.abc import Callable
from pathlib import Path

from tests.broken.corpus import Broken, Place

DELETE = "delete it and run the command again"


def stage(name: str, file: str, content: str | bytes, *says: str) -> Broken:
    """The pipeline over a run whose record of a stage is damaged."""

    def make(place: Place) -> list[str]:
        place.write(f"run/stages/{file}", content)
        return place.pipeline("--reward_model_only")

    return Broken(name, "pipeline", make, (f"{{root}}/run/stages/{file}", *says))


def in_the_way(name: str, command: str, prepare: Callable[[Path], object], *says: str) -> Broken:
    """A command whose output directory is taken."""

    def make(place: Place) -> list[str]:
        prepare(place.root)
        arguments = {"reward-model": place.training, "rloo": place.rloo, "pipeline": place.pipeline}
        if command == "data":
            return [*place.data(place.world.data), f"--output_dir={place.root / 'out'}"]
        return arguments[command]()

    return Broken(name, command, make, says)


def file_at(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text("mine")


def directory_with(name: str, file: str, text: str = "mine") -> Callable[[Path], object]:
    def prepare(root: Path) -> None:
        (root / name).mkdir(parents=True)
        (root / name / file).write_text(text)

    return prepare


CASES = [
    stage("record_cut_short", "data.json", '{"key": "ab', "is damaged", DELETE),
    stage("record_of_bytes", "data.json", b"\xff\xfe\x00", "is damaged", DELETE),
    stage("record_that_is_a_list", "data.json", "[1]", "is damaged: expected a JSON object", DELETE),
    stage("record_of_nothing", "data.json", "", "is damaged", DELETE),
    stage("record_without_anything", "data.json", "{}", "is damaged", "key", DELETE),
    stage(
        "record_with_a_list_of_inputs",
        "data.json",
        '{"key": "a", "execution": "b", "inputs": [], "outputs": {}, "seconds": 1}',
        "inputs",
        DELETE,
    ),
    stage("record_of_a_later_stage", "reward_model.json", '{"inputs": {}}', "is damaged", DELETE),
    stage("record_nested_too_deeply", "verification.json", "[" * 100_000, "is damaged", DELETE),
    stage("record_of_a_begun_stage", "data.started.json", '{"key": 1}', "is damaged", DELETE),
    in_the_way(
        "a_file_where_the_model_goes", "reward-model", file_at("out"), "{root}/out is a file", "give another one"
    ),
    in_the_way(
        "a_directory_of_the_users",
        "reward-model",
        directory_with("out", "notes.txt"),
        "{root}/out is not empty and does not hold a result of this tool",
        "Give another --output_dir",
    ),
    in_the_way("a_policy_where_the_users_files_are", "rloo", directory_with("out", "notes.txt"), "it is left alone"),
    in_the_way(
        "a_damaged_marker",
        "reward-model",
        directory_with("out", "stage.json", "{"),
        "{root}/out/stage.json is damaged",
        DELETE,
    ),
    in_the_way(
        "a_marker_that_is_a_list",
        "reward-model",
        directory_with("out", "stage.json", "[]"),
        "{root}/out/stage.json is damaged",
        DELETE,
    ),
    in_the_way("a_file_where_the_record_goes", "reward-model", file_at("out.run"), "{root}/out.run"),
    in_the_way("a_file_where_the_run_goes", "pipeline", file_at("run"), "{root}/run"),
    in_the_way("a_directory_for_the_lock", "pipeline", directory_with("run/.lock", "x"), "{root}/run/.lock"),
    in_the_way("a_file_where_the_report_goes", "data", file_at("out"), "{root}/out"),
]
