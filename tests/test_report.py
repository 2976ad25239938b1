"""The report: true sentences, whole pages, and a command line that leaves nothing half done."""

import copy
import html.parser
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_studies import made_up
from problems import usual

for module in ("tyro", "rich", "matplotlib", "jinja2"):
    pytest.importorskip(module)

from jbptt.experiments import tasks  # noqa: E402
from jbptt.report import cli, contents, display, output, tables, work  # noqa: E402
from jbptt.report.commands import report as study  # noqa: E402
from jbptt.report.html import render_page  # noqa: E402
from jbptt.report.questions import coverage, learning, reach, window_costs  # noqa: E402
from jbptt.report.themes import DARK, LIGHT, repaint  # noqa: E402

ALL = tuple(contents.QUESTIONS)
NASTY = "<script>alert(1)</script>$&\n\t\x00"


def curve(cell, stage, half_life, verdict="vanishing", reach=3, norms=(1.0, 0.5, 0.25, 0.0)):
    return {
        "cell": cell, "stage": stage, "norms": list(norms), "half_life": half_life, "reach": reach, "verdict": verdict,
    }  # fmt: skip


def part(ten=2, one=4):
    recommended = {"0.1": ten, "0.01": one}
    return {"relative_error": [0.5, 0.1, 0.05, 0.0], "cosine": [0.8, 0.9, 0.99, 1.0], "recommended": recommended}


def cost(strategy, window, seconds=1e-3, size=1000):
    return {
        "strategy": strategy, "window": window, "seconds": seconds, "seconds_spread": 1e-5, "temporary_bytes": size,
    }  # fmt: skip


def anatomy_data():
    """The second half of the page: what two cells and two networks look like inside."""
    spectrum = {"num_steps": 9, "standard_errors": [0.01, 0.01], "spans": [1, 4]}
    spectrum["log_singular_values"] = [[0.5, -1.0], [1.0, None]]
    alignment = {"misalignment": [0.7, 0.35, 0.175], "rate": -0.7, "predicted_rate": -0.69, "sentence": "turns"}
    measures = {"loss": [[[0.5, 0.6], [0.1, 0.2]], [[0.5, 0.6], [0.9, 1.0]]]}
    measures |= {name: measures["loss"] for name in ("adjoint_ratio", "exponent", "gradient_error", "gradient_cosine")}
    curve = {name: [0.5, 0.1, 0.0] for name in ("relative_error", "block_relative_error", "cosine", "block_cosine")}
    own = {"decision": "Train with full BPTT.", "num_steps": 8, "norms": [1.0, 0.5, 0.1], "curve": curve,
           "recommended": {"sliding": {"0.1": 2, "0.01": 0}, "block": {"0.1": 4, "0.01": 8}},
           "costs": {"full": {"seconds": 1e-3, "temporary_bytes": 2048.0}}}  # fmt: skip
    curve["windows"] = [1, 2, 3]
    names = ["full BPTT", "blocks of 2", "random"]
    return {
        "diagnosis": own,
        "gradients": {"names": names, "num_samples": 8, "relative_bias": [0.0, 0.3, 0.1],
                      "relative_bias_error": [0.0, 0.0, 0.08], "variance": [0.0, 0.0, 0.16],
                      "cosine": [1.0, 0.9, 0.8], "norm_ratio": [1.0, 0.7, 1.1]},
        "randomness": {"cell": "rnn", "keep_prob": 0.5, "num_samples": 8,
                       "names": ["full", "blocks of 2", "π = 0.5", "bare"],
                       "relative_bias": [0.0, 0.3, 0.1, 0.4], "relative_bias_error": [0.0, 0.0, 0.08, 0.05],
                       "variance": [0.0, 0.0, 0.25, 0.09], "cosine": [1.0, 0.9, 0.8, 0.85],
                       "norm_ratio": [1.0, 0.7, 1.1, 0.6], "seconds": [0.002, 0.001, 0.003, None]},
        "flow": {"cell": "rnn", "matrix": [[2.0, 0, 0], [1.0, 2.0, 0], [0.0, 1.0, 2.0]]},
        "spectra": {"models": [
            {"cell": "rnn", "stage": "before", "exponents": [-0.5, -0.6], **spectrum},
            {"cell": "rnn", "stage": "after", "exponents": [0.2, -0.1], **spectrum},
        ]},
        "growth": {"radii": [0.5, 1.5], "lags": [0, 1, 2], "norms": [[1.0, 0.5, 0.25], [1.0, 1.5, 2.25]],
                   "lengths": [2, 4], "gradient_norms": [[0.5, 0.5], [2.0, 30.0]],
                   "clipped_norms": [[0.5, 0.5], [1.0, 1.0]], "max_norm": 1.0},
        "powers": {"size": 2, "power": 3, "eigenvalues": [[0.5, 0.5], [0.5, -0.5]],
                   "eigenvalues_of_power": [[-0.25, 0.25], [-0.25, -0.25]], "largest_difference": 1e-16,
                   "alignments": [{"name": "symmetric", "case": "aligns", **alignment},
                                  {"name": "turning", "case": "complex pair", **alignment, "rate": None}]},
        "remedies": {"patients": ["vanishing", "exploding"], "remedies": ["nothing", "a remedy"], "radii": [0.5, 1.5],
                     "num_updates": 7, "num_steps": 5, "before": measures, "after": measures,
                     "diverged": [[0, 0], [0, 0]], "constant_loss": [0.5, 0.6]},
    }  # fmt: skip


@pytest.fixture
def data():
    size = 4
    full = np.tril(np.ones((size, size)))
    fixed = full * np.kron(np.eye(2), np.ones((2, 2)))
    randomized = full * 1.0
    randomized[2:, :2] = 0
    randomized[3, 2] = 2.5
    matrices = {"full": full, "fixed": fixed, "randomized": randomized}
    return {
        "schema_version": 1,
        "seed": 0,
        "dtype": "float32",
        "versions": {"jbptt": "0.1.0", "jax": "1", "jaxlib": "1", "optax": "1", "numpy": "2", "python": "3"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "settings": {"text": None, "cell": ["rnn"], "hidden_size": 8, "num_steps": 8, "batch_size": 4, "quick": True},
        "text": {"source": "a.txt", "characters": 9000, "vocabulary": 5, "folded_characters": 0,
                 "train_characters": 8000, "heldout_characters": 1000},
        "coverage": {
            "characters": "ab c",
            "window": 2,
            "keep_prob": 0.4,
            "matrices": {name: matrix.tolist() for name, matrix in matrices.items()},
            "pairs": {name: int((matrix > 0).sum()) for name, matrix in matrices.items()},
        },
        "reach": {"lags": [0, 1, 2, 3], "curves": [curve("rnn", "before", 1.0), curve("rnn", "after", 2.0)]},
        "windows": {
            "models": [
                {
                    "cell": "rnn",
                    "windows": [1, 2, 3, 4],
                    "sliding": part(),
                    "block": part(3, None),
                    "costs": [cost("full", 8, 4e-3, 8000), cost("block", 4), cost("sliding", 4)],
                }
            ]
        },
        "learning": output.plain_numbers(
            learning.numbers_of(made_up(1.0, 1.5, 1.001)) | {"model": "rnn, 8 units", "unit": "nats"}
        ),
        **anatomy_data(),
        "created": "2020-01-01T00:00:00+00:00",
        "command": "jbptt report",
    }  # fmt: skip


def plain(sentence):
    return sentence.replace("\u00a0", " ")


# Sentences


def test_coverage_counts_and_weights(data):
    text = coverage.QUESTION.say(data["coverage"])
    assert "Of the 10 pairs" in text and "covers 6 (60 %)" in text and "up to 2.5" in text
    data["coverage"]["matrices"]["randomized"] = data["coverage"]["matrices"]["full"]
    data["coverage"]["pairs"]["randomized"] = 10
    text = coverage.QUESTION.say(data["coverage"])
    assert "covers all 10, with no weight above 1" in text


def test_reach_says_what_happens_to_each_cell():
    curves = [
        curve("rnn", "before", 4.0), curve("rnn", "after", 2.0),
        curve("gru", "before", 2.0), curve("gru", "after", None, "stable", None),
        curve("lstm", "before", None, "exploding", None), curve("lstm", "after", None, "non-finite", 0, [None] * 4),
    ]  # fmt: skip
    text = reach.QUESTION.say({"lags": [0, 1, 2, 3], "curves": curves})
    assert "vanishes in the rnn (half-life 2 steps; under 1 % from lag 3 on)" in text
    assert "it neither vanishes nor explodes in the gru (no halving; still at least 1 % at lag 3)" in text
    assert "it is not finite in the lstm;" in text
    assert "rnn 4 steps → 2 steps (shorter)" in text
    assert "gru 2 steps → does not halve (longer)" in text
    assert "lstm does not halve → not finite." in text


def test_an_unchanged_half_life_is_called_unchanged():
    curves = [curve("rnn", "before", 2.0001), curve("rnn", "after", 2.0)]
    assert "(unchanged)" in reach.QUESTION.say({"lags": [0, 1, 2, 3], "curves": curves})
    curves = [curve("rnn", "before", None, "exploding"), curve("rnn", "after", None, "exploding")]
    text = reach.QUESTION.say({"lags": [0, 1, 2, 3], "curves": curves})
    assert "explodes in the rnn" in text and "vanish" not in text and "(unchanged)" in text


def test_windows_name_what_is_needed_and_its_cost(data):
    text = window_costs.QUESTION.say(data["windows"])
    assert "the rnn needs a sliding window of 2 (4) or blocks of 3 (more than 4) steps" in text
    assert "0.25 and 0.12 with blocks of 4 (rnn)" in text  # a quarter of 4 ms, an eighth of 8000 bytes


def test_windows_that_only_full_bptt_satisfies(data):
    model = data["windows"]["models"][0]
    model["block"] = part(8, 8)
    assert window_costs.recommended_window(model, "block", "0.1") is None
    text = window_costs.QUESTION.say(data["windows"])
    assert "blocks of all 8 (all 8) steps" in text and "One gradient" not in text
    model["windows"], model["sliding"] = list(range(1, 9)), part(None, None)
    assert "sliding window of no number of (no number of)" in window_costs.QUESTION.say(data["windows"])


def test_what_the_second_half_says(data):
    said = {name: plain(sentence) for name, sentence in contents.write_sentences(data).items()}
    assert "norm of 2 on average, and on that of 2 steps before with 0 (0 %)" in said["flow"]
    assert "goes from -0.5 to 0.2 ± 0.01 nats per step and is positive: gradients explode" in said["spectra"]
    assert "reach a norm of 30; clipping leaves a norm of 1 at most" in said["growth"]
    assert (
        "-0.7 nats per step in the symmetric example" in said["powers"] and "turning (complex pair)" in said["powers"]
    )
    assert said["remedies"].startswith("Predicting the mean has a loss of 0.55; after 7 updates the vanishing network ")
    assert "the vanishing network does better with a remedy, the" in said["remedies"]
    assert "exploding network does better with nothing that was tried. Against" in said["remedies"]
    assert "the vanishing network ends lower with a remedy; the exploding network ends higher" in said["remedies"]


def test_the_price_of_randomness_follows_the_numbers(data):
    price, describe = data["randomness"], contents.QUESTIONS["randomness"].say
    text = describe(price)
    assert "The mean of 8 draws with π = 0.5 misses the gradient of the trained rnn by 10 % of its norm" in text
    assert (
        "of its norm, which is within two standard errors of 8 %. One draw scatters by 50 % around that mean." in text
    )
    assert "Without 1/π the mean misses the gradient by 40 %, and one draw scatters by 30 %." in text
    assert "Blocks of 2 are off by 30 %" in text and "1.50 times as long as full BPTT" in text
    assert "a gradient with blocks of 2 is closer to the exact one than one with π = 0.5 (30 % against 50 %)" in text
    other = describe({**price, "relative_bias": [0.0, 0.9, 0.2, 0.4], "seconds": [None] * 4})
    assert "by 20 % of its norm, which is more than two standard errors of 8 %, as happens where" in other
    assert "as long as" not in other
    assert "a gradient with π = 0.5 is closer to the exact one than one with blocks of 2 (50 % against 90 %)" in other
    same = describe({**price, "relative_bias": [0.0] * 4, "variance": [0.0] * 4})
    assert "is as far from the exact one as one with" in same
    assert "nothing can be said" in describe({**price, "variance": [0.0, 0.0, None, 0.1]})


def test_the_table_of_remedies_counts_what_its_means_leave_out(data):
    data["remedies"]["after"] = {
        **data["remedies"]["after"],
        "loss": [[[0.5, 0.6], [None, 0.2]], [[0.5, 0.6], [None, None]]],
    }
    data["remedies"]["before"] = data["remedies"]["before"] | {
        "gradient_error": [[[1e-8, 3e-8], [0.5, 0.7]], [[0.0, 0.0], [1e-3, 1e-3]]]
    }
    rows = contents.make_tables(data)["remedies"].rows
    assert [row[4] for row in rows] == ["0", "0.6", "0", "0.001"]
    assert [row[-2:] for row in rows] == [
        ("0.55", "0 of 2"),
        ("0.2", "1 of 2"),
        ("0.55", "0 of 2"),
        ("not finite", "2 of 2"),
    ]


def test_sentences_of_the_second_half_follow_the_numbers(data):
    data["spectra"]["models"][1].update(exponents=[0.015, -0.1])
    data["growth"].update(gradient_norms=[[0.5, 0.5], [0.2, 0.9]])
    data["flow"]["matrix"][1][1] = None
    data["remedies"]["after"] = {"loss": [[[0.5, 0.6], [0.5, 0.6]], [[0.5, 0.6], [None, 0.1]]]}
    said = contents.QUESTIONS
    assert "cannot be told from 0" in said["spectra"].say(data["spectra"])
    assert "No gradient reaches the norm of 1" in said["growth"].say(data["growth"])
    assert "not finite" in said["flow"].say(data["flow"])
    words = said["remedies"].say(data["remedies"])
    assert "vanishing network ends alike with all" in words and "not finite in some run with a remedy" in words
    data["remedies"]["after"] = {"loss": [[[None, 0.6], [0.2, 0.3]], [[0.4, 0.5], [0.2, 0.1]]]}
    words = said["remedies"].say(data["remedies"])
    assert "the vanishing network does better with a remedy, the exploding network does better with whatever" in words
    assert "vanishing network ends not finite in some run with no remedy, so that nothing is compared" in words
    data["remedies"].update(
        remedies=["nothing", "a", "b", "c"],
        constant_loss=[0.5, 0.5],
        after={"loss": [4 * [[0.1, 0.2]], 4 * [[0.4, 0.2]]]},
    )
    data["remedies"]["after"]["loss"][0][2] = [0.1, 0.6]
    words = said["remedies"].say(data["remedies"])
    assert "does better with all but b, the exploding network does better with whatever was tried" in words
    data["remedies"]["after"]["loss"][0][1:] = 3 * [[0.1, 0.6]]
    assert "the vanishing network does better with no remedy, the" in said["remedies"].say(data["remedies"])


# Pictures and page


@pytest.mark.parametrize("name", usual(["coverage"], ALL))
def test_pictures_are_the_same_bytes_every_time_and_valid(data, name):
    data["coverage"]["characters"] = NASTY[-4:]
    (first,), (second,) = (contents.draw_pictures(data, LIGHT, [name]).values() for _ in range(2))
    assert first == second and "<dc:date>" not in first
    ElementTree.fromstring(first)


@pytest.mark.parametrize("name", usual(["reach"], ["reach", "windows", "diagnosis", "spectra", "powers", "remedies"]))
def test_a_repainted_picture_is_the_one_drawn_dark(data, name):
    """Apart from the ids of its parts, which are hashes of their styles."""
    (light,), (dark,) = (contents.draw_pictures(data, theme, [name]).values() for theme in (LIGHT, DARK))

    def numbered(svg):
        ids = dict.fromkeys(re.findall(r'[#"]([mp][0-9a-f]{10})\b', svg))
        order = {found: f"id{i}" for i, found in enumerate(sorted(ids, key=svg.index))}
        return re.sub("|".join(order), lambda found: order[found.group()], svg) if order else svg

    assert light != dark
    assert numbered(repaint(light, LIGHT, DARK)) == numbered(dark)


@pytest.mark.filterwarnings("error")
@pytest.mark.more("test_pictures_draw_on_the_axes_they_are_given")
def test_pictures_survive_numbers_that_no_log_axis_shows(data):
    for found in data["reach"]["curves"]:
        found.update(norms=[None, 0.0, None, None], half_life=None, verdict="non-finite", reach=None)
    model = data["windows"]["models"][0]
    model["sliding"] = {"relative_error": [None] * 4, "cosine": [None] * 4, "recommended": {"0.1": None, "0.01": None}}
    model["costs"] = [cost("full", 8, 1e-3, 0)]
    data["learning"].update(constant_loss=None, temporary_bytes=[None] * 3)
    data["learning"]["curves"]["test"][1] = [[[None] * 5] * 5]
    data["diagnosis"].update(norms=[None, 0.0], curve={**data["diagnosis"]["curve"], "relative_error": [None] * 3})
    data["gradients"].update(variance=[None] * 3)
    data["flow"]["matrix"] = [[None, 0], [0.0, 0.0]]
    data["growth"].update(norms=[[None] * 3, [0.0] * 3], gradient_norms=[[None] * 2] * 2, clipped_norms=[[0.0] * 2] * 2)
    data["spectra"]["models"][1].update(exponents=[None, None], log_singular_values=[[None, None]] * 2)
    data["powers"]["alignments"][0].update(misalignment=[None, 0.0, None], rate=None, predicted_rate=None)
    for field in data["remedies"]["after"].values():
        field[0][0] = [None, None]
    assert tuple(contents.draw_pictures(data)) == ALL
    assert all(contents.write_sentences(data).values())
    assert all(table.rows for table in contents.make_tables(data).values())


def test_pictures_draw_on_the_axes_they_are_given(data):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert reach.draw(data["reach"], ax=ax) is ax
    assert learning.draw(data["learning"], axes=Figure().subplots(2))[0].lines
    assert coverage.draw(data["coverage"]).shape == (3,)
    assert window_costs.draw(data["windows"]).shape == (4, 1)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def render(data):
    data["sentences"] = contents.write_sentences(data)
    light, dark = (drawn_once(data, theme) for theme in (LIGHT, DARK))
    assert tuple(light) == tuple(dark) == ALL
    return render_page(data, light, dark)


def test_the_page_loads_nothing_and_says_everything(data):
    text = render(data)
    page = Page(text)
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    inside = [link for link in links if link.startswith("#")]
    assert {link[1:] for link in inside} == {*ALL} and len(inside) > len(ALL)
    assert len(links) - len(inside) == 2 * len(ALL)
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    assert not re.search(r"url\(|@import", text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(ALL) and all(len(attrs["alt"]) > 60 for attrs in images)
    assert sum(tag == "table" for tag, _ in page.tags) == len(ALL)
    for sentence in data["sentences"].values():
        assert sentence in page.text
    assert "jbptt report" in page.text and "prefers-color-scheme: dark" in text


@pytest.mark.more("test_the_page_loads_nothing_and_says_everything")
def test_a_text_full_of_markup_stays_text(data):
    data["text"]["source"] = data["command"] = data["settings"]["text"] = NASTY
    data["coverage"]["characters"] = "<&>$"
    data["learning"]["ways"][1] = "<script>alert(1)</script>"
    page = Page(render(data))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text
    for svg in contents.draw_pictures(data).values():
        assert not [node for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("script")]


@pytest.mark.more("test_the_page_loads_nothing_and_says_everything")
def test_letters_are_text_in_any_script(data):
    """In the fonts of whoever looks at them, not as boxes or paths."""
    data["coverage"]["characters"] = "文<好"
    data["text"] |= {"vocabulary": 128, "distinct_characters": 3000, "folded_characters": 5130}
    drawn = contents.draw_pictures(data)
    labels = [node.text for node in ElementTree.fromstring(drawn["coverage"]).iter() if node.tag.endswith("}text")]
    assert all(labels.count(letter) == 6 for letter in "文<好") and "monospace" in drawn["coverage"]
    assert all("<text" in svg for svg in drawn.values())
    assert "5,130 of 9,000 characters (57 %)" in Page(render(data)).text


@pytest.mark.parametrize("num_cells", usual([3], [1, 3]))
def test_the_legend_of_windows_is_not_cut(data, num_cells):
    axes = window_costs.draw({"models": data["windows"]["models"] * num_cells})
    figure = axes[0, 0].figure
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_tables_in_a_narrow_terminal_keep_every_word(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    display.print_summary(data, tmp_path)
    words = capsys.readouterr().out.split()
    assert {"half-life", "vanishing", "sliding,", "beside"} <= set(words)


def test_a_strategys_table_is_right(data):
    rows = contents.make_tables(data)
    assert rows["coverage"].rows[1] == ("fixed", "6", "60 %", "1", "6")
    assert rows["windows"].rows[2][3:] == ("3", "1 ms ± 10 µs", "1,000 B", "4 steps")
    assert rows["reach"].rows[0][3] == "1 step" and tables.format_steps(1234) == "1,234 steps"
    assert rows["learning"].rows[1][:3] == ("blocks of 2", "0.01", "1.5")
    assert rows["learning"].rows[1][4] == "worse" and rows["learning"].rows[2][4] == "as good"
    assert rows["diagnosis"].rows[1][2] == "none measured" and rows["diagnosis"].rows[3][2] == "all 8"
    assert rows["gradients"].rows[2][:3] == ("random", "0.1 ± 0.08", "0.4")
    assert tables.format_seconds(2.5e-4) == "250 µs" and tables.format_bytes(3 * 2**20) == "3 MiB"


# Command line


@pytest.fixture
def quick_study(monkeypatch, data):
    # What only a model of one's own has would give the page another beginning.
    def run(settings, text, progress):
        progress("train", 0.0)
        progress("measure", 0.5)
        return {name: copy.deepcopy(data[name]) for name in data if name not in ("created", "command")}

    monkeypatch.setattr(study, "check_report_settings", lambda settings: "text")
    monkeypatch.setattr(study, "run_study", run)
    monkeypatch.setattr(output, "draw_pictures", drawn_once)


def drawn_once(data, theme=LIGHT, names=None):
    """The pictures, drawn by the first test that asks: what the others look at is files and folders."""
    names = tuple(contents.asked(data) if names is None else names)
    key = theme is LIGHT, names, json.dumps({name: data[name] for name in names})
    if key not in DRAWN:
        DRAWN[key] = contents.draw_pictures(data, theme, names)
    return dict(DRAWN[key])


DRAWN = {}


# The study itself, as small as it can be

SMALL = study.ReportSettings(
    cell=("gru", "rnn"),
    hidden_size=5,
    num_steps=7,
    batch_size=3,
    windows=(3,),
    keep_prob=0.5,
    num_seeds=2,
    num_updates=20,
    seed=2,
    quick=True,
)


@pytest.fixture(scope="module")
def small_study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "QUICK", work.QUICK._replace(num_updates=6, num_draws=4))
        shown = []
        text = study.check_report_settings(SMALL)
        return study.run_study(SMALL, text, lambda what, done: shown.append(done)), shown


@pytest.mark.more("test_report_writes_every_file")
def test_a_study_says_what_the_schema_promises(small_study):
    found, shown = small_study
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found["coverage"]["matrices"]) == ["full", "fixed", "randomized"]
    assert [(c["cell"], c["stage"]) for c in found["reach"]["curves"]] == [
        (cell, stage) for cell in SMALL.cell for stage in ("before", "after")
    ]
    assert [model["cell"] for model in found["windows"]["models"]] == ["rnn"]  # quick: the last only
    learned = learning.study_of(found["learning"])
    assert learned.ways == ("full BPTT", "blocks of 3", "random, keep 0.5") and learned.num_seeds == 2
    assert output.plain_numbers(learning.numbers_of(learned)).items() <= found["learning"].items()
    assert learned.curves.test[0][0, :, 0].tolist() == learned.curves.test[1][0, :, 0].tolist()  # from the same starts
    assert shown == sorted(shown) and shown[-1] == 1.0
    assert np.shape(found["flow"]["matrix"]) == (SMALL.num_steps,) * 2
    assert [(m["cell"], m["stage"]) for m in found["spectra"]["models"]] == [("rnn", "before"), ("rnn", "after")]
    assert found["growth"]["lengths"] == [2, 4] and len(found["growth"]["norms"][0]) == SMALL.num_steps
    assert found["powers"]["largest_difference"] < 1e-12
    assert [a["case"] for a in found["powers"]["alignments"]] == [
        "aligns", "aligns", "tie", "complex pair", "orthogonal start", "defective"
    ]  # fmt: skip
    assert "remedies" not in found
    assert found["randomness"]["names"] == [
        "full", "blocks of 2", "π = 0.5", "π = 0.5, no 1/π", "artbp 2", "fitted lengths"
    ]  # fmt: skip
    assert found["randomness"]["variance"][:2] == [0, 0] and min(found["randomness"]["variance"][2:]) > 0
    assert found["randomness"]["relative_bias"][1] > 0 and found["randomness"]["relative_bias_error"][1] == 0
    assert [seconds is None for seconds in found["randomness"]["seconds"]] == [False] * 3 + [True] * 3
    assert contents.write_sentences(found)
    assert tasks.count_symbols(tasks.read_text()).items() <= found["text"].items()


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_report_writes_every_file(quick_study, data, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.main(["report", "--out", str(out), "--seed", "3"]) == 0
    assert leftovers(out) == sorted(output.FILES)
    assert leftovers(tmp_path) == ["new"] and leftovers(tmp_path / "new") == ["folder"]
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert found["command"] == f"jbptt report --out {out} --seed 3" and found["created"].endswith("+00:00")
    assert tuple(found["sentences"]) == ALL
    assert {name: found[name] for name in data if name not in ("created", "command")} == {
        name: data[name] for name in data if name not in ("created", "command")
    }
    shown = capsys.readouterr()
    assert f"Report: {out / 'report.html'}" in shown.out and "rnn" in shown.out
    assert "measure" in shown.err


@pytest.mark.more("test_an_earlier_report_is_replaced_and_other_files_stay")
def test_a_shorter_report_leaves_no_picture_of_a_longer_one(quick_study, data, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["report", "--out", str(out)]) == 0 and (out / "remedies.svg").exists()
    del data["remedies"]
    assert cli.main(["report", "--out", str(out)]) == 0 and not (out / "remedies.svg").exists()


def test_an_earlier_report_is_replaced_and_other_files_stay(quick_study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert cli.main(["report", "--out", str(out)]) == 0
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (out / "notes.txt").read_text() == "mine"
    assert leftovers(tmp_path) == ["out"]


ERRORS = [KeyboardInterrupt, RuntimeError, OSError("disk full"), MemoryError("too big")]
PAGE = [("page", error) for error in ERRORS]


@pytest.mark.parametrize(
    "failure",
    [*(("study", error) for error in ERRORS), *usual(PAGE[2:3], PAGE, full=PAGE)],
    ids=str,
)
def test_a_failure_leaves_the_earlier_report_as_it_was(quick_study, monkeypatch, tmp_path, capsys, failure):
    place, error = failure

    def fail(*args):
        raise error

    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old")
    if place == "study":
        monkeypatch.setattr(study, "run_study", fail)
    else:
        monkeypatch.setattr(output.os, "replace", fail)
    arguments = ["report", "--out", str(out)]
    if error is RuntimeError:  # a bug of ours shows where it is
        with pytest.raises(RuntimeError):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == (130 if error is KeyboardInterrupt else 2)
        assert "Traceback" not in capsys.readouterr().err
    assert leftovers(tmp_path) == ["out"] and leftovers(out) == ["report.html"]
    assert (out / "report.html").read_text() == "old"


WRONG = [
    ["--windows", "0"],
    ["--windows", "many"],
    ["--windows", "64"],
    ["--num-seeds", "1"],
    ["--learning-rates", "0"],
    ["--num-steps", "0"],
    ["--keep-prob", "0"],
    ["--seed", "4294967296"],
    ["--cell", "transformer"],
    ["--cores", "0"],
    ["--cores", "100000"],
    ["--hiden-size", "3"],
    ["--text", "no/such/file"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_input_is_one_line_and_status_2(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "run_study", lambda *args: pytest.fail("ran"))
    assert cli.main(["report", "--out", str(tmp_path / "out"), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("jbptt: error: ")
    assert arguments[0].strip("-").replace("-", "_") in shown.err.replace("-", "_")
    assert leftovers(tmp_path) == []


def test_cores_cannot_be_chosen_once_jax_computes(tmp_path, capsys, monkeypatch):
    jax.block_until_ready(jnp.zeros(()))
    monkeypatch.setattr(study, "_available_cores", lambda: 4)
    cores = next(n for n in range(1, 3) if n != jax.config.jax_num_cpu_devices)
    assert cli.main(["report", "--out", str(tmp_path / "out"), "--cores", str(cores)]) == 2
    assert "cores must be chosen before" in capsys.readouterr().err and leftovers(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe binary \x80", b"short"])
def test_a_text_that_cannot_be_used_is_refused(content, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "run_study", lambda *args: pytest.fail("ran"))
    text = tmp_path / "text"
    text.write_bytes(content)
    assert cli.main(["report", "--out", str(tmp_path / "out"), "--text", str(text)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and leftovers(tmp_path) == ["text"]


@pytest.mark.parametrize("out", ["file", "file/below", "busy"])
def test_an_out_that_cannot_be_written_is_refused_before_anything_runs(out, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "run_study", lambda *args: pytest.fail("ran"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "busy" / "report.html").mkdir(parents=True)
    assert cli.main(["report", "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert leftovers(tmp_path) == ["busy", "file"] and (tmp_path / "file").read_text() == "mine"


def test_a_linked_folder_is_filled_and_stays_a_link(quick_study, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert cli.main(["report", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and leftovers(tmp_path / "real") == sorted(output.FILES)


def test_help_version_and_no_arguments(capsys):
    assert cli.main([]) == 0
    assert "report" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jbptt ")
    assert cli.main(["report", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("text", "cell", "hidden-size", "num-steps", "batch-size", "windows", "keep-prob", "seed", "out"):
        assert f"--{option}" in shown
    assert "--quick" in shown and "--cores" in shown
    assert cli.main(["reprot"]) == 2
    assert "reprot; there are report, diagnose, compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["report", "--hiden-size", "3"], "--hidden-size"),
        (["report", "--quik"], "--quick"),
        (["compare", "--num-sample=3", "--num-updats=1"], "--num-samples or --num-updates"),
        (["diagnose", "a:b", "--mesure"], "--no-measure"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_one_meant(arguments, meant, capsys):
    assert cli.main(arguments) == 2
    assert f"; perhaps you meant {meant}; jbptt {arguments[0]} --help" in capsys.readouterr().err


def test_the_module_runs_and_draws_nothing_to_show_help():
    code = "import sys, runpy; sys.argv = ['jbptt', '--help']\ntry: runpy.run_module('jbptt', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\nassert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "report" in done.stdout
