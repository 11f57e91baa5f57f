"""The report: what is shown of an example, the page and the terminal summary."""

import base64
import html.parser
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tracin_beam.report import view
from tracin_beam.report.influence import influence_page
from tracin_beam.report.show import LONGEST_TEXT, Shown, show_features
from tracin_beam.report.text import influence_summary

HOSTILE = '<script>alert("x")</script>\x1b[31m\u202e&'

RUN = {
    "method": "TracInCP",
    "config": {"projection": "countsketch", "dim": 1024, "layers": "all", "target": "loss"},
    "versions": {"keras": "3.15.1"},
    "counts": {
        "train": {"read": 1500, "embedded": 1498, "rejected": 2, "shards": 4},
        "test": {"read": 60, "embedded": 60, "rejected": 0, "shards": 1},
    },
    "checkpoints": [
        {"step": 110, "epoch": 2, "learning_rate": 0.1},
        {"step": 220, "epoch": 4, "learning_rate": 0.05},
    ],
    "retrieval": {
        "queries": 10,
        "k": 10,
        "proponents": {"recall_projection": 0.87, "recall": 1.0},
        "opponents": {"recall_projection": 0.74, "recall": 0.99},
        "correlation": {"pearson": 0.97, "spearman": 0.96},
    },
    "timings": {"embed": 12.0},
}


def row(test: int, role: str, rank: int, score: float, **others: object) -> dict[str, object]:
    sign = 1 if role == "proponent" else -1
    return {
        "test_id": f"test-{test}",
        "train_id": f"train-{rank}",
        "role": role,
        "rank": rank,
        "score": sign * score,
        "score_by_checkpoint": [sign * score / 4, sign * score * 3 / 4],
        "test_label": 1.0,
        "test_prediction": 1.0,
        "train_label": 1.0,
        "train_prediction": 1.0,
        "train_shard": "train.tfrecord",
        "train_position": rank,
        "test_shard": "test.tfrecord",
        "test_position": test,
        "exact": True,
    } | others


def table(*tests: int, **others: object) -> pa.Table:
    return pa.Table.from_pylist(
        [
            row(test, role, rank, 1000.0 / rank, **others)
            for test in tests
            for role in ("proponent", "opponent")
            for rank in (2, 1)
        ]
    )


class Page(html.parser.HTMLParser):
    """A page's elements and visible text; fails on elements that are not closed in order."""

    VOID = frozenset({"meta", "img", "line", "rect"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self._open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def pixels(shown: Shown) -> np.ndarray:
    assert shown.kind == "image"
    prefix = "data:image/png;base64,"
    assert shown.content.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.content.removeprefix(prefix)))))


def serialized(**features: bytes) -> bytes:
    import tensorflow as tf

    return tf.train.Example(
        features=tf.train.Features(
            feature={
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for name, value in features.items()
            }
        )
    ).SerializeToString()


class TestShowFeatures:
    @pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3), (8, 9, 4)])
    def test_bytes_are_shown_as_they_are(self, shape):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = array[..., 0] if shape[2:] == (1,) else array
        np.testing.assert_array_equal(pixels(show_features(array, b"")), expected)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.0, 0.25, 0.5], [0, 64, 128]),  # [0, 1]
            ([-0.5, 0.0, 0.5], [64, 128, 191]),  # [-1, 1]
            ([0.0, 100.0, 200.0], [0, 100, 200]),  # [0, 255]
            ([0.0, 8.0, 16.0], [0, 128, 255]),  # its own range
            ([-2.0, 0.0, 3.0], [0, 102, 255]),
            ([np.nan, 0.5, np.inf], [0, 128, 255]),
            ([5.0, 5.0, 5.0], [0, 0, 0]),
        ],
    )
    def test_floats_are_scaled_by_convention(self, values, expected):
        array = np.resize(np.asarray(values, np.float32), (6, 6, 1))
        np.testing.assert_array_equal(
            pixels(show_features(array, b"")), np.resize(expected, (6, 6))
        )

    def test_a_picture_among_other_features(self):
        features = {"age": np.float32(4), "picture": np.full((5, 5, 1), 7, np.uint8)}
        assert (pixels(show_features(features, b"")) == 7).all()
        assert (pixels(show_features(tuple(features.values()), b"")) == 7).all()

    def test_large_pictures_are_scaled_down_and_small_ones_pixelated(self):
        large = show_features(np.zeros((1000, 500, 3), np.uint8), b"")
        assert pixels(large).shape == (256, 128, 3)
        assert not large.pixelated
        assert show_features(np.zeros((8, 8), np.uint8), b"").pixelated

    @pytest.mark.parametrize("shape", [(3, 8), (8, 8, 2), (4000, 8), (8,), (1, 8, 8, 3)])
    def test_other_shapes_are_not_pictures(self, shape):
        assert show_features(np.zeros(shape), b"").kind == "text"

    def test_strings(self):
        assert show_features(np.asarray(b"caf\xc3\xa9 \xff", object), b"").content == "café \ufffd"
        words = np.asarray([b"one", b"two"], object)
        assert show_features(words, b"").content == "one two"
        features = {"title": np.asarray(b"Storm", object), "year": np.int64(2004)}
        assert show_features(features, b"").content == "title: Storm, year: 2004"

    def test_text_beside_the_features(self):
        raw = serialized(
            id=b"an id that is longer than the text itself",
            image=b"\x89PNG\r\n\x1a\n\0\0\0",
            text="Muddy waters – still".encode(),
        )
        ids = np.asarray([4, 8, 15, 0, 0])
        assert show_features(ids, raw).content == "Muddy waters – still"

    @pytest.mark.parametrize(
        "raw", [b"", b"\xff\xfe not an example", serialized(id=b"train-1", x=b"\0\x01\x80?")]
    )
    def test_numbers(self, raw):
        assert show_features(np.asarray([1.23456, 20000.0, 3.0]), raw).content == "1.235 2e+04 3"
        features = {"rooms": np.float64(6.98413), "income": np.asarray([8.25, 1])}
        assert show_features(features, raw).content == "rooms: 6.984, income: 8.25 1"
        assert show_features(np.zeros((1, 2)), raw).content == "[1×2] 0 0"

    def test_long_content_is_cut(self):
        for features in (np.zeros(100_000), np.asarray(b"word " * 1000, object)):
            content = show_features(features, b"").content
            assert len(content) <= LONGEST_TEXT
            assert content.endswith("…")

    def test_control_characters_are_replaced(self):
        text = np.asarray(b"a\0b\x1b[31mc\nd", object)
        assert show_features(text, b"").content == "a\ufffdb\ufffd[31mc\nd"


class TestInfluencePage:
    def test_holds_the_table_in_the_order_of_ranks(self):
        page = Page(influence_page(table(0), {}, RUN))
        scores = [word for word in page.text.split() if word[0] in "+−"]
        assert scores == ["+1,000", "+500.0", "−1,000", "−500.0"]
        assert "1,498 examples of 1,500 read, 2 rejected, 4 shards" in page.text
        assert "step 110 to 220, learning rate 0.1 to 0.05" in page.text
        assert "0.990, 0.740 by projection alone, over 10 sampled test examples" in page.text
        assert "Pearson 0.970, Spearman 0.960" in page.text
        assert page.all("svg")[0]["aria-label"] == (
            "Score by checkpoint: step 110: +250.0, step 220: +750.0"
        )

    def test_shows_pictures_and_texts(self):
        picture = show_features(np.zeros((8, 8), np.uint8), b"")
        shown = {
            ("test.tfrecord", 0): picture,
            ("train.tfrecord", 1): picture,
            ("train.tfrecord", 2): Shown("text", "Muddy <b>waters</b>"),
        }
        page = Page(influence_page(table(0), shown, RUN))
        images = page.all("img")
        assert {image["alt"] for image in images} == {
            "Test example test-0",
            "Training example train-1",
        }
        assert all(image["src"] == picture.content for image in images)
        assert all(image["class"] == "pixelated" for image in images)
        assert "Muddy <b>waters</b>" in page.text

    def test_escapes_whatever_is_not_ours(self):
        rows = table(0, test_id=HOSTILE, train_id=HOSTILE)
        shown = {("test.tfrecord", 0): Shown("text", HOSTILE)}
        run = RUN | {"method": HOSTILE, "config": {HOSTILE: HOSTILE}, "versions": {HOSTILE: 1}}
        source = influence_page(rows, shown, run, label_names=[HOSTILE, HOSTILE])
        page = Page(source)
        assert not page.all("script")
        assert "<script>" in page.text  # seen as text
        assert r"\x1b[31m\u202e&" in page.text
        assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))

    def test_needs_no_network(self):
        page = Page(influence_page(table(0), {}, RUN))
        assert not page.all("link")
        for _, attributes in page.elements:
            for name in ("src", "href", "srcset"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:"))

    def test_anchors_lead_to_their_examples(self):
        page = Page(influence_page(table(0, 1), {}, RUN))
        ids = [article["id"] for article in page.all("article")]
        assert [link["href"] for link in page.all("a")] == [f"#{id}" for id in ids]

    def test_says_when_scores_are_estimates(self):
        assert "estimates" not in Page(influence_page(table(0), {}, RUN)).text
        assert (
            "These scores are estimates"
            in Page(influence_page(table(0, exact=False), {}, RUN)).text
        )

    def test_wrong_predictions_come_first_and_are_marked(self):
        rows = pa.concat_tables([table(0, 1), table(2, test_prediction=0.0), table(3)])
        page = Page(influence_page(rows, {}, RUN, label_names=["cat", "dog"], max_tests=2))
        assert [link["title"] for link in page.all("a")] == ["test-2", "test-0"]
        assert "2 of 4 test examples, wrong predictions first" in page.text
        assert page.text.count("✗ wrong") == 1
        assert "cat" in page.text

    def test_differing_labels_are_marked(self):
        page = Page(influence_page(table(0, train_label=0.0), {}, RUN))
        assert page.text.count("differs:") == 4

    def test_regression_marks_nothing(self):
        rows = table(0, test_label=2.5, test_prediction=2.25, train_label=0.0)
        page = Page(influence_page(rows, {}, RUN))
        assert "2.500" in page.text
        assert "✗" not in page.text
        assert "≠" not in page.text

    @pytest.mark.parametrize("unknown", [None, float("nan")])
    def test_unknown_labels(self, unknown):
        rows = table(0).drop_columns(["test_label"])
        rows = rows.append_column("test_label", pa.array([unknown] * len(rows), pa.float64()))
        page = Page(influence_page(rows, {}, RUN, label_names=["cat", "dog"]))
        assert "unknown" in page.text
        assert "✗" not in page.text

    @pytest.mark.parametrize("label", [-1.0, 7.0, 0.5])
    def test_labels_without_a_name_are_numbers(self, label):
        page = Page(influence_page(table(0, test_label=label), {}, RUN, label_names=["cat"]))
        assert f"{label:.4g}" in page.text

    @pytest.mark.parametrize(
        "run",
        [
            {},
            {
                "counts": None,
                "retrieval": None,
                "checkpoints": None,
                "config": None,
                "versions": None,
            },
            {"counts": {"train": {"read": 5}}, "retrieval": {"proponents": {"recall": None}}},
            {"checkpoints": [{"step": None}], "retrieval": {"correlation": {"pearson": None}}},
        ],
    )
    def test_tolerates_what_run_json_does_not_say(self, run):
        assert "None" not in Page(influence_page(table(0), {}, run)).text
        assert "None" not in influence_summary(table(0), run)

    def test_empty_table(self):
        rows = table(0).slice(0, 0)
        assert "The influence table is empty." in Page(influence_page(rows, {}, RUN)).text
        assert influence_summary(rows, RUN).startswith("The influence table is empty.")

    def test_one_role_may_be_missing(self):
        rows = pa.Table.from_pylist([row(0, "proponent", 1, 3.0)])
        assert "None." in Page(influence_page(rows, {}, RUN)).text

    def test_a_single_checkpoint_has_no_bars(self):
        rows = pa.Table.from_pylist([row(0, "proponent", 1, 3.0, score_by_checkpoint=[3.0])])
        assert not Page(influence_page(rows, {}, RUN)).all("svg")


class TestInfluenceSummary:
    def test_columns_are_aligned(self):
        rows = pa.concat_tables([table(0), table(1, test_prediction=0.0)])
        lines = influence_summary(rows, RUN, label_names=["cat", "dog"]).splitlines()
        assert lines[:5] == [
            "test-1: predicted cat, label dog  (wrong)",
            "  proponent  +1,000  label dog  predicted dog  train-1",
            "  proponent  +500.0  label dog  predicted dog  train-2",
            "  opponent   -1,000  label dog  predicted dog  train-1",
            "  opponent   -500.0  label dog  predicted dog  train-2",
        ]
        assert "Recall@10, proponents    1.000, 0.870 by projection alone" in "\n".join(lines)

    def test_no_control_characters_reach_the_terminal(self):
        rows = table(0, test_id=HOSTILE, train_id="a\nb\r\u2028")
        summary = influence_summary(rows, {"method": HOSTILE}, label_names=["", HOSTILE])
        assert not {"\x1b", "\r", "\u202e", "\u2028"} & set(summary)
        assert r"a\nb\r\u2028" in summary

    def test_says_what_it_leaves_out(self):
        summary = influence_summary(table(*range(8)), RUN, max_tests=5)
        assert "3 more test examples" in summary
        assert "estimates" not in summary
        assert "estimates" in influence_summary(table(0, exact=False), RUN)


def test_places_shown_are_those_of_the_page():
    rows = pa.concat_tables([table(0, 1), table(2, test_prediction=0.0)])
    places = view.places_shown(rows, view.reading(rows, RUN, None), max_tests=2)
    assert places == {
        ("test.tfrecord", 2),
        ("test.tfrecord", 0),
        ("train.tfrecord", 1),
        ("train.tfrecord", 2),
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.0, "1.000"),
        (-12.3456, "-12.35"),
        (123456.7, "123,457"),
        (1.5e9, "1.500e+09"),
        (0.0123456, "0.01235"),
        (-1.5e-7, "-1.500e-07"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_number(value, expected):
    assert view.number(value) == expected


def binary(threshold, probabilities):
    kind = {"name": "classification", "threshold": threshold, "probabilities": probabilities}
    return RUN | {"kind": kind}


def named(kind):
    return RUN | {"kind": {"name": kind}}


def scored(prediction, label, test=0):
    return table(test, test_prediction=prediction, test_label=label, train_label=label)


@pytest.mark.parametrize(
    ("prediction", "label", "run", "first"),
    [
        (0.5171, 1.0, binary(0.5, True), "test-0: predicted pos (0.52), label pos"),
        (0.5171, 0.0, binary(0.5, True), "test-0: predicted pos (0.52), label neg  (wrong)"),
        (0.31, 0.0, binary(0.5, True), "test-0: predicted neg (0.31), label neg"),
        (0.31, 1.0, binary(0.0, False), "test-0: predicted pos (logit 0.31), label pos"),
        (-2.0, 1.0, binary(0.0, False), "test-0: predicted neg (logit -2.00), label pos  (wrong)"),
        (0.5171, 1.0, named("regression"), "test-0: predicted 0.5171, label pos"),
        (np.nan, np.nan, named("multilabel"), "test-0: predicted unknown, label unknown"),
    ],
)
def test_one_output_for_two_classes_is_read_by_its_threshold(prediction, label, run, first):
    rows = scored(prediction, label)
    names = ["neg", "pos"]
    assert influence_summary(rows, run, label_names=names).splitlines()[0] == first
    text = Page(influence_page(rows, {}, run, label_names=names)).text
    assert ("wrong" in text) == ("wrong" in first)
    if np.isfinite(prediction):
        assert first.partition("predicted ")[2].partition(",")[0] in text


def test_wrong_ones_come_first_by_their_threshold():
    rows = pa.concat_tables([scored(0.6, 1.0, 0), scored(0.6, 0.0, 1), scored(0.1, 0.0, 2)])
    lines = influence_summary(rows, binary(0.5, True)).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("test-")] == [
        "test-1",
        "test-0",
        "test-2",
    ]


def test_long_ids_are_cut_and_stay_on_one_line():
    assert view.shown("a\nb\u2028c") == r"a\nb\u2028c"
    assert view.shown(b"\xff") != view.shown(b"\\xff")
    assert view.shown("x" * view.LONGEST_NAME) == "x" * view.LONGEST_NAME
    text = view.shown("a" * 500_000 + "b" * 500_000)
    assert len(text) < 200
    assert text.startswith("aaa")
    assert text.endswith("bbb (1,000,000 characters)")
