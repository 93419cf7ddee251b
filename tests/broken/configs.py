"""Broken configuration files: no YAML, no mapping, unknown keys, and values of another type."""

from tests.broken.corpus import USAGE, Broken, as_yaml, yaml_case

DEEP = "[" * 20_000


def missing(command: str) -> Broken:
    says = ("{root}/absent.yaml: cannot read the configuration file",)
    return Broken(
        f"missing_{command}", command, lambda place: ["--config", str(place.root / "absent.yaml")], says, USAGE
    )


CASES = [
    missing("pipeline"),
    missing("demo"),
    Broken(
        "a_directory", "rloo", lambda place: ["--config", str(place.root)], ("{root} is a directory, where",), USAGE
    ),
    yaml_case("no_yaml", "rloo", "seed: [1,", "not valid YAML"),
    yaml_case("a_tab_for_indentation", "pipeline", "reward:\n\tseed: 1\n", "not valid YAML"),
    yaml_case("utf_16", "rloo", "seed: 1\n".encode("utf-16"), "cannot read the configuration file"),
    yaml_case("latin_1", "rloo", "run_name: Größe\n".encode("latin-1"), "cannot read the configuration file"),
    yaml_case("nul", "rloo", b"seed: 1\x00\n", "not valid YAML"),
    yaml_case("two_documents", "rloo", "seed: 1\n---\nseed: 2\n", "not valid YAML"),
    yaml_case("a_list", "rloo", "- seed: 1\n", "expected a mapping from flag names to values, got list"),
    yaml_case("a_word", "rloo", "seed", "expected a mapping from flag names to values, got str"),
    yaml_case("nested_too_deeply", "rloo", f"seed: {DEEP}", "nested too deeply"),
    yaml_case("a_program", "rloo", "seed: !!python/object/apply:os.system ['exit 1']\n", "not valid YAML"),
    yaml_case("a_date_that_is_none", "rloo", "run_name: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
    yaml_case("a_number_of_5000_digits", "rloo", f"seed: {'1' * 5000}\n", "not valid YAML: Exceeds the limit"),
    yaml_case("a_key_twice", "rloo", "seed: 1\nrloo_k: 2\nseed: 2\n", "'seed' stands there twice", "line 3"),
    yaml_case("a_key_of_a_section_twice", "pipeline", "reward: {seed: 1, seed: 2}\n", "'seed' stands there twice"),
    yaml_case("a_list_as_key", "rloo", "? [a]\n: 1\n", "not valid YAML"),
    yaml_case("a_number_as_key", "rloo", "3: 1\n", "unknown key '3'"),
    yaml_case(
        "an_unknown_key", "rloo", as_yaml(lerning_rate=1), "unknown key 'lerning_rate'; did you mean 'learning_rate'?"
    ),
    yaml_case("an_unknown_key_of_a_section", "pipeline", as_yaml(rloo={"kl": 1}), "rloo: unknown key 'kl'"),
    yaml_case("a_section_of_another_name", "pipeline", as_yaml(rlo={"kl_coef": 1}), "unknown key 'rlo'"),
    yaml_case("a_section_that_is_a_list", "pipeline", "rloo: [1]\n", "rloo: expected a mapping"),
    yaml_case("a_setting_of_the_demo", "pipeline", "demo: {rows: 3}\n", "run it with helpsteer-rloo demo"),
    yaml_case("a_word_for_a_number", "reward-model", as_yaml(max_length="ten"), "max_length: expected int, got 'ten'"),
    yaml_case("a_list_for_a_number", "reward-model", as_yaml(max_length=[1]), "max_length: expected int, got [1]"),
    yaml_case("nothing_for_a_number", "reward-model", "max_length:\n", "max_length: expected int, got None"),
    yaml_case("a_switch_for_a_number", "reward-model", "max_length: yes\n", "max_length: expected int, got True"),
    yaml_case("a_mapping_for_a_text", "reward-model", "language: {a: 1}\n", "language: expected str, got {'a': 1}"),
    yaml_case(
        "a_thousand_laughs",
        "reward-model",
        "max_length: [&a [1, 1, 1, 1], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], &d [*c, *c, *c, *c], "
        "&e [*d, *d, *d, *d], &f [*e, *e, *e, *e], &g [*f, *f, *f, *f], &h [*g, *g, *g, *g], [*h, *h, *h, *h]]\n",
        "max_length: expected int, got [",
    ),
    yaml_case("nul_in_a_text", "reward-model", 'output_dir: "a\\0b"\n', "output_dir: ", "NUL"),
    yaml_case("a_list_for_the_demo", "demo", "demo: [a]\n", "demo: expected a mapping"),
    yaml_case("a_number_for_the_demo", "demo", "demo: 5\n", "demo: expected a mapping"),
    yaml_case("a_number_for_the_demos_base", "demo", "demo: {base: 3}\n", "demo: base: expected a mapping"),
    yaml_case("a_word_for_the_demos_rows", "demo", "demo: {rows: ten}\n", "demo: rows: expected int, got 'ten'"),
    yaml_case("no_rows_for_the_demo", "demo", "demo: {rows: 0}\n", "demo: rows is 0; expected more"),
    yaml_case(
        "a_word_for_a_size_of_the_base",
        "demo",
        "demo: {base: {layers: two}}\n",
        "demo: base: layers: expected int, got 'two'",
    ),
    yaml_case("an_unknown_size_of_the_base", "demo", "demo: {base: {layer: 2}}\n", "did you mean 'layers'?"),
]
