"""The page is whole in itself, says what the run says, and holds texts of any kind as nothing but text."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from helpsteer_rloo.alarms import Alarm
from helpsteer_rloo.report import charts
from helpsteer_rloo.report.charts import Axes, Dot, Line
from helpsteer_rloo.report.collect import collect, find_run
from helpsteer_rloo.report.figure import MOST_POINTS, curves, thinned
from helpsteer_rloo.report.figures import reward_figures
from helpsteer_rloo.report.page import breakable, embedded, render, typeset
from helpsteer_rloo.report.policy_figures import policies_of, policy_figures
from helpsteer_rloo.report.readings import distribution
from helpsteer_rloo.report.records import BestOfN, Log, Policy, Run
from helpsteer_rloo.report.verdict import Sentence, facts, settings, verdict
from helpsteer_rloo.statistics import Estimate
from tests.report.runs import HOSTILE, make_run, policy_log, start


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, and the text of each kind of element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(root):
    return collect(find_run(str(root)), "2026-11-26 08:00:00 UTC")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read(make_run(tmp_path_factory.mktemp("runs") / "first"))


@pytest.fixture(scope="module")
def page(run):
    return render([run])


def test_nothing_is_loaded_and_only_the_pages_own_script_and_style_are_allowed(page):
    parsed = Page(page)
    (policy,) = [
        meta["content"] for meta in parsed.of("meta") if "content-security" in meta.get("http-equiv", "").lower()
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert [s.get("type") for s in parsed.of("script")] == ["application/json", None]
    for tag, attributes in parsed.elements:
        assert not {"src", "style", "action", "data"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#"), (tag, attributes)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_every_chart_has_a_name_of_its_own_and_takes_its_colours_from_the_page(page):
    parsed = Page(page)
    images = parsed.of("svg")
    assert len(images) > 20
    assert all(image["role"] == "img" for image in images)
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert {part for image in images for part in image["aria-labelledby"].split()} <= set(identities)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search(r'(fill|stroke)="(#|rgb|black|white)', drawn)
    assert len(parsed.of("figure")) == len(images) == len([d for d in parsed.texts["summary"] if d == "Numbers"])


def test_the_page_says_what_the_run_says(page):
    text = " ".join(" ".join(part) for part in Page(page.replace("<wbr>", "")).texts.values())
    text = text.replace("\xa0", " ")
    for said in (
        "The reward model orders 80.0 % [75.0 %, 85.0 %] (n = 200) of the held-out pairs as their labels do.",
        "The true quality of answers rose from 0.400 to 0.700 (+0.300 [+0.200, +0.400]) on 60 held-out prompts.",
        "What the words mean",
        "0123456789abcdef",
        "helpsteer-rloo demo --seed 7",
        "left out: tie",
        "80 on 40 prompts",
        "It likes length more than they do.",
        "kl_coef",
    ):
        assert said in text
    assert 'http-equiv="refresh"' not in page
    assert 'data-state="running"' not in page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run all of whose texts want to be something else."""
    return read(make_run(tmp_path_factory.mktemp("runs") / "<b onx=1>", domain=HOSTILE[1], texts=HOSTILE))


def test_hostile_texts_are_text_and_nothing_else(hostile):
    page = render([hostile])
    page.encode("utf-8")
    parsed = Page(page)
    assert not parsed.of("img")
    assert not parsed.of("b")
    assert len(parsed.of("script")) == 2
    assert page.count("</script>") == 2
    data = re.search(r'id="sample-sets">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in data
    assert "\u2028" not in data
    answers, pairs = json.loads(data)
    shown = {sample["sides"][1]["text"] for sample in answers["samples"]}
    assert {text for text in HOSTILE if len(text) < 1000} <= shown
    assert max(map(len, shown)) < 21_000
    assert pairs["samples"][0]["prompt"][0] == ["user", "Hello!"]
    assert any("</script>" in text for text in parsed.texts["text"])  # the domain, in a chart


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    """WCAG 2.2, relative luminance and contrast ratio."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_of_charts_can_be_told_from_the_page_in_both_themes(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r"\{([^{}]*--page:[^{}]*)\}", style)
    ]
    assert len(themes) == 3
    assert themes[1] == themes[2] != themes[0]
    for theme in themes:
        for name in ("ink", "muted", "accent"):
            assert min(contrast(theme[name], theme[back]) for back in ("page", "panel")) >= 4.5, name
        for number in range(1, charts.SERIES + 1):
            assert contrast(theme[f"series-{number}"], theme["page"]) >= 3, number


def test_json_for_a_script_comes_back_as_it_was():
    value = {"texts": HOSTILE, "number": 1.5}
    assert json.loads(embedded(value)) == value
    assert not set("<>&\u2028\u2029\ud800\udfff") & set(embedded(value))


def test_a_hostile_name_is_escaped_in_a_chart():
    name = "\"><script>x</script>'&"
    drawn = charts.svg(charts.lines([Line(name, [(0, 1), (1, 2)]), Line("b", [(0, 0)])], Axes(name)), "n", name, name)
    assert "<script>" not in drawn
    assert Page(drawn).texts["title"] == [name]


@pytest.mark.parametrize(
    ("accuracy", "says"), [(0.5, "not significantly better than chance"), (0.2, "are the labels inverted?")]
)
def test_a_weak_reward_model_is_told_of_once(tmp_path, accuracy, says):
    run = read(make_run(tmp_path / "weak", accuracy=accuracy, gold=0.1, concern=True))
    told = [sentence.text for sentence in verdict(run) if sentence.text.startswith("The reward model orders")]
    assert len(told) == 1
    assert says in told[0]
    assert not [sentence.text for sentence in verdict(run) if "It prefers the chosen response in" in sentence.text]


def test_several_runs_stand_side_by_side(run, tmp_path):
    other = read(make_run(tmp_path / "second", accuracy=0.5, gold=-0.2, concern=True))
    page = render([run, other])
    parsed = Page(page)
    assert "first and second" in parsed.texts["h1"]
    text = " ".join(" ".join(part) for part in parsed.texts.values())
    assert "not significantly better than chance" in text
    assert "The true quality of answers fell from 0.400 to 0.200" in text
    assert {"first", "second"} <= set(parsed.texts["th"])
    sets = json.loads(re.search(r'id="sample-sets">(.*?)</script>', page, re.DOTALL)[1])
    assert [one["id"] for one in sets] == ["1-answers", "1-pairs", "2-answers", "2-pairs"]
    names = {name for figure in policy_figures(policies_of([run, other])) for name, *_ in figure.rows}
    assert {"first", "second", "first: reward", "second: guard"} <= names


def test_concerns_come_first():
    policy = Policy(
        verdict="It exploits.", rolled_back_to=10, bad_steps=3, alarms=(Alarm("length", 20, "Too long.", acts=False),)
    )
    found = verdict(Run("r", "finished", "now", policy=policy, notes=("data.json is damaged",)))
    assert {s.text for s in found if s.kind == "look"} == {
        "data.json is damaged",
        "RLOO: 3 steps were skipped, their gradient not finite.",
        "The run was ended by an alarm: It exploits. The policy is that of step 10.",
        "Alarm at step 20: Too long.",
    }


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = render([Run("r", "running", "now")])
    assert 'data-state="running"' in page[:1000]
    assert '<noscript><meta http-equiv="refresh" content="60"></noscript>' in page
    assert "It is still running, as of now." in page
    assert "Nothing has been recorded yet." in page


def test_columns_of_several_runs_are_aligned(run):
    empty = Run("empty", "unfinished", "now")
    for _, rows in facts([run, empty]):
        assert all(len(cells) == 2 and cells[1] == "" for _, cells in rows)
    assert all(values[1] == default for _, default, values in settings([run, empty]))


def test_long_logs_are_thinned_by_means():
    points = [(float(n), float(n % 2)) for n in range(10_000)]
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS
    assert thin[3][1] == pytest.approx(0.5, abs=0.02)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]
    log = Log(tuple({**row, "step": n} for n, row in enumerate(policy_log(10_000), start=1)))
    figures = list(policy_figures([("r", Policy(log=log))]))
    assert max(len(figure.svg) for figure in figures) < 20_000
    assert {figure.name for figure in figures} >= {"policy-reward", "policy-entropy", "eos", "memory"}


def test_the_numbers_behind_a_figure_are_those_of_the_run(run):
    figures = {figure.name: figure for figure in reward_figures([("m", run.reward_models[0])])}
    assert ("general", "m", "0.800", "[0.750, 0.850]", "200") in figures["accuracy-domain"].rows
    assert ("m", "0.950", "0.970", "90") in figures["reliability"].rows
    assert ("m", "10", "0.35") in figures["reward-loss"].rows
    assert ("longer: model", "m", "0.600", "[0.500, 0.700]", "200") in figures["bias"].rows
    assert sum(int(row[1]) for row in figures["scores-1"].rows) == 40


def test_histograms_of_two_samples_share_their_bins():
    first, second = distribution([0.0, 0.5, 1.0], [1.0, 2.0], most=4)
    assert (first.counts, second.counts) == ((1, 1, 1, 0), (0, 0, 1, 1))


@pytest.mark.parametrize("value", [1.0, 0.0, -3.5, 1e9, 1e-300, 5e-324, 1e300])
def test_a_histogram_of_equal_values_has_them_in_its_middle(value):
    values, others = [value] * 3, [value, value + abs(value) * 1e-13]
    for histogram, count in zip(distribution(values, others, most=24), (3, 2), strict=True):
        assert sum(histogram.counts[11:13]) == histogram.total == count
        left = [x for x, _ in histogram.points]
        assert len(set(left)) == 25
        assert left[12] == pytest.approx(value, abs=1e-9 * abs(value) + 1e-300)
        assert left[24] - left[0] == pytest.approx(abs(value) if abs(value) > 1e-320 else 1.0)


def test_values_that_are_as_far_apart_as_numbers_can_be_have_a_histogram():
    first, second = distribution([-1.7e308, 1.7e308], [0.0], most=4)
    assert (first.counts, second.counts) == ((1, 0, 0, 1), (0, 0, 1, 0))


def best_of_n(less, reaches=True, score="gold"):
    curve = ({"n": 1.0, "kl": 0.0}, {"n": 4.0, "kl": 0.64})
    return BestOfN(curve, 3.2 if reaches else 4.0, reaches, {"reward": Estimate(9.0, 8.0, 9.5, 60), score: less})


@pytest.mark.parametrize(
    ("best", "said", "kind"),
    [
        (
            best_of_n(Estimate(-0.0571, -0.081, -0.033, 60)),
            "The trained policy's true quality is lower than that of best-of-n of the untrained one: "
            "-0.057 [-0.081, -0.033], at n = 3.2, which has the same KL, 2.50 nats.",
            "plain",
        ),
        (
            best_of_n(Estimate(0.2, 0.1, 0.3, 60), reaches=False),
            "The trained policy's true quality is higher than that of best-of-n of the untrained one: "
            "+0.200 [+0.100, +0.300], at n = 4, the largest that was drawn, which has less KL, 0.64 nats.",
            "good",
        ),
        (
            best_of_n(Estimate(-0.0001, -0.5, 0.5, 60), score="reward"),
            "The trained policy's reward is not significantly different from that of best-of-n of the untrained one: "
            "+0.000 [-0.500, +0.500], at n = 3.2, which has the same KL, 2.50 nats.",
            "plain",
        ),
    ],
)
def test_the_verdict_compares_with_best_of_n(run, best, said, kind):
    policy = replace(run.policy, judged=replace(run.policy.judged, best_of_n=best))
    assert Sentence(said, kind) in verdict(replace(run, policy=policy))


def test_the_page_says_it(page):
    said = "is higher than that of best-of-n of the untrained one: +1.000 [+0.500, +1.500], at n = 4"
    assert said in page.replace("\xa0", " ")


def test_zero_has_no_sign():
    assert str(Estimate(-0.0001, -0.0004, 0.0004, 3)) == "0.000 [0.000, 0.000], n = 3"
    (figure,) = curves("n", "t", "", [("a", [(0.0, -0.0), (1.0, 1.0)])], Axes("step"))
    assert figure.rows[0] == ("a", "0", "0")


def test_sentences_are_set_as_in_books():
    said = "It fell by -0.057 [-0.081, -0.033] in 84.5% and 3 % of data-2.json, 2-grams, n = 12 of -3e-05."
    assert typeset(said) == (
        "It fell by −0.057 [−0.081,\xa0−0.033] in 84.5\xa0% and 3\xa0% of data-2.json, 2-grams, n\xa0=\xa012 of −3e-05."
    )
    assert breakable("runs/<b>_1") == "runs/<wbr>&lt;b&gt;_<wbr>1"


def test_every_axis_of_a_curve_has_a_title(run):
    figures = [*reward_figures([("m", run.reward_models[0])]), *policy_figures([("p", run.policy)])]
    drawn = [figure for figure in figures if figure.head[:2] == ("series", "optimizer step")]
    assert len(drawn) >= 10
    for figure in drawn:
        assert figure.head[2] in Page(figure.svg).texts["text"]


def test_whole_numbers_among_the_settings_are_written_as_such(tmp_path):
    start(tmp_path, {"reward": {"save_steps": 200.0, "lr_scheduler_type": "cosine", "learning_rate": 0.001}})
    (tmp_path / "stages").mkdir()
    named = {s.name: (s.value, s.default) for s in read(tmp_path).settings}
    assert named["save_steps"] == ("200", "100")
    assert named["lr_scheduler_type"] == ("cosine", "linear")
    assert named["learning_rate"] == ("0.001", "1e-05")


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_series_can_be_drawn(count):
    names = [f"series {n}" for n in range(count)]
    rows = [Dot("row", name, Estimate(0.5, float("nan"), float("nan"), 3)) for name in names]
    for chart in (
        charts.dots(rows, Axes("x")),
        charts.lines([Line(name, [(1, 1)]) for name in names], Axes("x")),
        charts.bars([("row", name, 0.5) for name in names], Axes("x")),
    ):
        assert charts.svg(chart, "n", "t", "d").endswith("</svg>")


def test_a_line_goes_through_its_points_in_their_order_also_where_x_goes_back():
    chart = charts.lines([Line("a", [(0.0, 0.0), (2.0, 1.0), (1.0, 2.0)])], Axes("x", marks=True))
    drawn = re.search(r'<path d="M([^"]*)"[^>]*stroke-width="2"', charts.svg(chart, "n", "t", "d"))[1]
    x = [float(point.split(",")[0]) for point in drawn.split("L")]
    assert x[0] < x[2] < x[1]
    assert x[2] - x[0] == pytest.approx(x[1] - x[2], abs=0.01)
