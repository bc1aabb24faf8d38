"""The report: one self-contained page that says the numbers it was given."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from ecgfm.config import Published
from ecgfm.contracts import empty_table
from ecgfm.ecg import LEADS
from ecgfm.pages.expected import beside
from ecgfm.pages.findings import DIFFERENCES, DrawnEcg, Report
from ecgfm.pages.findings import render as render_with_files
from ecgfm.pages.parts import MAX_POINTS, Cohort, SplitCounts, Training, training_panels
from ecgfm.scores.assessment import ScoredRecords, assess
from ecgfm.scores.baselines import few_shot
from ecgfm.scores.confusion import ConfusionMatrix, confused_pairs
from ecgfm.scores.embedding_map import embedding_map
from ecgfm.scores.metrics import best_f1_threshold, compare, operating_point

LABELS = ["atrial fibrillation", "<b>pacing</b> & rhythm", "sinus rhythm"]
PUBLISHED = [
    Published("macro_auroc", 0.912, "Their <best> model", "Journal 1, 2", test_records=2198),
    Published("auprc", 0.5, "Theirs", "Journal 3", label="sinus rhythm", ours="probe"),
    Published("challenge_score", 0.58, "The winner", "Challenge 2021"),
    Published("auroc", 0.99, "Theirs", "Journal 3", label="atrial flutter"),
]
PEOPLE = {"records": 100, "patients": 80, "unknown_patients": 0}
FLOW = {
    "listed": 1207,
    "rejected": {"truncated": 3, "unreadable_header": 2},
    "prepared": {"records": 1202, "patients": 960, "unknown_patients": 0},
    "with_copies": 0,
    "excluded": {"constant_lead": 2},
    "splits": {"train": {**PEOPLE, "records": 1000}, "valid": PEOPLE, "test": PEOPLE},
}
FILES = {"model_card.md": ("Model card", "# A <model>\n"), "data_card.json": ("Data card", "{}\n")}
VOID = {"meta", "link", "br", "img", "hr"}


def render(report: Report) -> str:
    return render_with_files(report, FILES)


class Page(HTMLParser):
    """The page's tags, checked for balance, its text, and whatever it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(n: int = 80, seed: int = 0) -> Report:
    """A plausible evaluation of `n` records."""
    random = np.random.default_rng(seed)
    truth = (random.random((n, 3)) < (0.1, 0.2, 0.5)).astype(float)
    truth[0], truth[1] = 1, 0
    truth[2, 0] = np.nan
    predictions = {
        name: 1 / (1 + np.exp(-(random.normal(size=truth.shape) + shift * np.nan_to_num(truth) - 1)))
        for name, shift in (("finetuned", 2.5), ("probe", 1.0), ("probe_random", 0.9), ("supervised", 0.8))
    }
    patients = [f"p{row // 2}" for row in range(n)]
    scores = compare(truth, predictions, LABELS, patients, differences=list(DIFFERENCES), n_replicates=200)
    ids = [f"synthetic/S{row}" for row in range(n)]
    facts = {
        "record_id": ids,
        "source": "synthetic",
        "sampling_rate_hz": 500.0,
        "age_years": random.integers(20, 90, n),
    }
    records = pl.concat([empty_table("records"), pl.DataFrame(facts)], how="diagonal_relaxed")
    noise = pl.DataFrame({"record_id": ids, "lead_noise_uv": random.random((n, 12)).tolist()})
    quality = pl.concat([empty_table("quality"), noise], how="diagonal_relaxed")
    assessment, _ = assess(
        ScoredRecords(truth, LABELS, [["1"], ["2"], ["3"]], patients, records, quality),
        predictions,
        "finetuned",
        [0.5, 0.5, 0.5],
        list(DIFFERENCES),
        n_replicates=200,
        confidence=0.9,
        seed=0,
    )
    embeddings = random.normal(size=(n, 4)) + np.nan_to_num(truth) @ random.normal(size=(3, 4))
    shots = {"pretrained": few_shot((embeddings, truth), (embeddings, truth), shots=(1, 5, None), seeds=range(2))}
    points = [
        operating_point(truth[:, k], predictions["finetuned"][:, k], best_f1_threshold(truth[:, k], truth[:, k]))
        for k in range(3)
    ]
    rows = [
        {"step": step, "split": split, "loss": 3.0 / (step + 1), "cmsc": 1.0, "learning_rate": 0.1}
        for step in range(20)
        for split in ("valid", "train")
    ]
    training = Training("Pretraining", [("parameters", "12,345")], {"model": {"width": 48}, "seed": 0}, rows, "Losses.")
    signal_mv = np.sin(np.arange(2500) / 40) * np.linspace(0.1, 1, 12)[:, None]
    return Report(
        cohort=Cohort(
            {"synthetic": 1207},
            {"truncated": 3, "unreadable_header": 2},
            {"constant_lead": 2},
            {
                "train": SplitCounts(1000, 800, 0, 2000, 990, 900, 1800),
                "valid": SplitCounts(100, 80, 0, 200, 99, 100, 200),
                "test": SplitCounts(100, n // 2, 0, 200, None, n, 2 * n),
            },
        ),
        counts={"total": FLOW, "sources": {"synthetic": FLOW}},
        leak="",
        training_is_known=True,
        labels=LABELS,
        aggregations=["mean", "max", "mean"],
        truth=truth,
        predictions=predictions,
        scores=scores,
        operating_points=points,
        n_replicates=200,
        confidence=0.9,
        probe_strengths=[("pretrained encoder", 0.01)],
        n_neighbours=5,
        assessment=assessment,
        shots=shots,
        published=beside(PUBLISHED, scores, None, len(truth)),
        confusion=confused_pairs(truth, predictions["finetuned"] >= 0.5, LABELS),
        embedding_map=embedding_map(
            dict.fromkeys(("train", "test"), embeddings), truth, LABELS, {"source": ["synthetic"] * n}, 100, 0
        ),
        dropped={"atrial flutter": "no positive record in valid"},
        pretraining=training,
        finetuning=replace(training, name="Finetuning"),
        ecgs=[
            DrawnEcg(
                1, "synthetic/S1", "A typical normal record", signal_mv, LEADS, 500.0, np.zeros(2500), "Its first 5 s."
            )
        ],
    )


def test_published_numbers_stand_beside_ours() -> None:
    one = report()
    finetuned, probe = one.scores["finetuned"], one.scores["probe"]
    ours = [(row.ours, row.n_records) for row in one.published]
    assert ours == [(finetuned.macro_auroc, 80), (probe.labels[2].auprc, 80), (None, 80), (None, 0)]
    text = Page(render(one)).text
    section = text[text.index("Published results beside these") : text.index("What others have published")]
    assert finetuned.macro_auroc is not None
    for shown in (
        "Their <best> model",
        "0.912",
        "2,198",
        f"{finetuned.macro_auroc.value:.3f}",
        "Journal 1, 2",
        "0.580",
    ):
        assert shown in section
    assert "Published results" not in Page(render(replace(one, published=()))).text


def test_the_page_is_well_formed_and_loads_nothing_from_elsewhere() -> None:
    html = render(report())
    page = Page(html)
    # the cohort; of ROC, PR and reliability two pictures each; few shots, two trainings, two maps; one ECG
    assert page.seen.count("img") == 1 + 3 * 2 + 1 + 2 + 2 + 1
    assert len(page.loads) == page.seen.count("img") + 1
    assert all(load.startswith("data:") for load in page.loads)
    assert page.seen.count("script") == 1  # sorts tables
    assert "default-src 'none'" in html  # and the browser sees to it that it does no more
    assert not re.search(r"url\(|@import|fetch|XMLHttp|import\(", html)


def test_pictures_inside_load_nothing_either() -> None:
    svgs = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', render(report()))
    assert len(svgs) == 12
    for encoded in svgs:
        svg = base64.b64decode(encoded).decode()
        links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', svg)
        assert links or "from the listed records" in svg
        assert all((plain or url).startswith("#") for plain, url in links)
        assert "DejaVu" not in svg


def test_the_headline_says_every_macro_number_with_its_interval() -> None:
    given = report()
    text = Page(render(given)).text
    for name in ("finetuned", "probe", "probe_random"):
        for estimate in (given.scores[name].macro_auroc, given.scores[name].macro_auprc):
            assert estimate is not None
            assert f"{estimate.value:.3f} ({estimate.low:.3f}\N{EN DASH}{estimate.high:.3f})" in text
    assert "On 80 test records of 40 patients" in text
    assert "90 % intervals" in text


def test_every_finding_has_its_numbers() -> None:
    given = report()
    text = Page(render(given)).text
    for scores, point in zip(given.scores["finetuned"].labels, given.operating_points, strict=True):
        assert scores.auroc is not None
        row = text[text.index(scores.label, text.index("Per finding")) :][:200]
        assert f"{scores.n} {scores.positives}" in row
        assert f"{scores.auroc.value:.3f} {scores.auroc.low:.3f}\N{EN DASH}{scores.auroc.high:.3f}" in row
        assert f"{point.true_positives}/{scores.positives}" in row
    assert "<b>pacing</b> &amp; rhythm" not in render(given)  # a label is text, never markup


def test_the_cohort_adds_up_on_the_page() -> None:
    text = Page(render(report())).text
    assert "Rejected: 3 truncated, 2 unreadable header." in text
    assert "Left out: 2 constant lead." in text
    assert "1,207 = 1,202 + 5; 1,202 = 1,200 + 2" in text
    assert "120 records in a split have no published label" in text
    assert "atrial flutter no positive record in valid" in text


@pytest.mark.parametrize(("n", "small"), [(80, True), (1200, False)])
def test_a_small_test_split_is_called_small(n: int, small: bool) -> None:
    given = report(n)
    assert (min(label.positives for label in given.scores["finetuned"].labels) < 10 or n // 2 < 200) == small
    assert ("This test split is small" in Page(render(given)).text) == small


def test_unknown_patients_are_not_called_patients() -> None:
    given = report()
    unknown = replace(given.cohort.splits["test"], known_patients=0, unknown_patients=100)
    cohort = replace(given.cohort, splits={**given.cohort.splits, "test": unknown})
    text = Page(render(replace(given, cohort=cohort))).text
    assert "On 80 test records that no training step has seen" in text
    assert "it holds 40 records (patients unknown)" in text
    assert "test 100 unknown 200" in text


def test_models_that_the_records_cannot_tell_apart_are_said_to_be_so() -> None:
    given = report()
    text = Page(render(given)).text
    clear, unclear = (given.scores[" - ".join(pair)].macro_auroc for pair in list(DIFFERENCES)[:2])
    assert clear is not None
    assert unclear is not None
    assert clear.low is not None
    assert unclear.low is not None
    assert unclear.high is not None
    assert clear.low > 0
    assert unclear.low < 0 < unclear.high
    assert "The finetuned model ranks better than the linear probe" in text
    assert "these records do not tell the probe on the pretrained encoder from the one on random weights" in text


def test_a_difference_that_many_comparisons_explain_is_none() -> None:
    """Its own interval may lie above 0: the sentence goes by the p that is corrected for the number of pairs."""
    given = report()
    tests = tuple(replace(t, p_holm=0.2) if t.label is None else t for t in given.assessment.tests)
    text = Page(render(replace(given, assessment=replace(given.assessment, tests=tests)))).text
    assert "do not tell the finetuned model from the linear probe" in text
    assert "corrected p 0.200" in text


def test_equal_data_give_equal_bytes_and_no_date() -> None:
    once, again = render(report()), render(report())
    assert once == again
    assert not re.search(r"20\d\d-\d\d-\d\d", Page(once).text)


def test_a_label_that_cannot_be_scored_is_named() -> None:
    given = report()
    truth = given.truth.copy()
    truth[:, 2] = 0
    scores = compare(
        truth, given.predictions, LABELS, [None] * len(truth), differences=list(DIFFERENCES), n_replicates=20
    )
    text = Page(render(replace(given, truth=truth, scores=scores))).text
    assert "records of one kind only: sinus rhythm." in text
    assert "over 2 findings" in text


def test_long_curves_are_thinned_and_settings_are_not_drawn() -> None:
    rows = [{"step": step, "split": "train", "loss": float(step), "learning_rate": 1.0} for step in range(10_000)]
    rows += [{"step": 9_999, "split": "valid", "loss": 7.0, "macro_auprc": None}]
    (panel,) = training_panels(rows)
    train, valid = panel.series
    assert (train.name, len(train.x)) == ("train", MAX_POINTS)
    assert np.allclose(train.x, train.y)
    assert train.y.mean() == pytest.approx(np.arange(10_000).mean(), rel=1e-2)  # of 33 steps each, or 34
    assert (valid.name, valid.y.tolist()) == ("valid", [7.0])


def test_what_the_model_knows_is_said_on_top() -> None:
    known = replace(report(), leak="of 80 records 1 learnt from (synthetic/S1)")
    text = Page(render(known)).text
    assert "The model knows the test split: of 80 records 1 learnt from (synthetic/S1)." in text
    assert "no training step has seen" not in text
    unknown = Page(render(replace(report(), training_is_known=False))).text
    assert "whether it has seen these records cannot be checked" in unknown
    assert "no training step has seen" not in unknown
    assert "no training step has seen" in Page(render(report())).text


def test_pairs_that_are_confused_stand_with_both_shares() -> None:
    given = report()
    assert not isinstance(given.confusion, ConfusionMatrix)
    first = given.confusion[0]
    text = Page(render(given)).text
    section = text[text.index("What is taken for what") : text.index("Where the records lie")]
    assert f"{first.missed} {first.called} {first.n}" in section
    assert f"{100 * first.n / first.with_missed:.1f} % {first.n}/{first.with_missed}" in section
    assert f"{100 * first.n / first.falsely_called:.1f} % {first.n}/{first.falsely_called}" in section
    none = Page(render(replace(given, confusion=[]))).text
    assert "No finding of a test record is missed where another is called in error." in none


def test_classes_that_exclude_each_other_have_a_matrix_with_shares() -> None:
    counts = np.array([[30, 10, 0], [1, 9, 0], [0, 0, 0]])
    html = render(replace(report(), confusion=ConfusionMatrix(tuple(LABELS), counts)))
    text = Page(html).text
    assert "atrial fibrillation 30 75.0 % 10 25.0 % 0 0.0 % 40" in text
    assert "<b>pacing</b> & rhythm 1 10.0 % 9 90.0 % 0 0.0 % 10" in text
    assert "sinus rhythm 0 0 0 0" in text  # no record of it: no shares
    assert html.count('style="background: rgba(') == 4


def test_the_map_says_how_many_records_and_how_much_of_the_variance() -> None:
    given = report()
    assert given.embedding_map is not None
    text = Page(render(given)).text
    assert f"the axes hold {100 * sum(given.embedding_map.explained):.1f} % of the variance" in text
    assert "principal components of the 80 test records. Each record" in text
    assert "records of the other splits lie on the same axes" in text
    assert "Where the records lie" not in Page(render(replace(given, embedding_map=None))).text


def test_several_sources_have_a_diagram_each_below_that_of_all() -> None:
    one = report()
    several = replace(one, counts={"total": FLOW, "sources": {"ptb_xl": FLOW, "own": FLOW}})
    assert Page(render(several)).seen.count("img") == Page(render(one)).seen.count("img") + 2
    assert "Source by source" in Page(render(several)).text
    assert "Source by source" not in Page(render(one)).text


def test_the_cards_are_on_the_page_as_text() -> None:
    html = render(report())
    assert "Model card (model_card.md) # A <model>" in Page(html).text
    assert "# A &lt;model&gt;" in html
    assert "Cards" not in Page(render_with_files(report(), {})).text
