"""The influence page."""

import numpy as np
import pyarrow as pa
import pytest
from influence_table import HOSTILE, RUN, Page, row, table

from tracin_beam.report.influence import influence_page
from tracin_beam.report.show import Shown, show_features
from tracin_beam.report.text import influence_summary


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

    def test_shows_features_as_tables_and_plays_sounds(self):
        sound = show_features(np.zeros(8000, np.int16), b"")
        shown = {
            ("train.tfrecord", 1): Shown("features", (("rooms", "3"), (HOSTILE, HOSTILE))),
            ("train.tfrecord", 2): sound,
        }
        page = Page(influence_page(table(0), shown, RUN))
        assert len(page.all("table")) == 2  # as a proponent and as an opponent
        assert "rooms" in page.text
        assert len(page.all("script")) == 1
        assert {audio["src"] for audio in page.all("audio")} == {sound.content}

    def test_shows_groups_and_slices(self):
        groups = [
            {
                "train_group": train,
                "test_group": test,
                "score_mean": 0.5 if train == "web" else -0.25,
                "standard_error": 0.2 if test else None,
                "train_examples": 7,
                "test_examples": 5 if test else 1,
            }
            for train in ("web", HOSTILE)
            for test in ("cat", "")
        ]
        slices = [
            {"slice": HOSTILE, "test_examples": 17, **row(0, role, rank, 2.0 / rank)}
            for role in ("proponent", "opponent")
            for rank in (2, 1)
        ]
        tables = [pa.Table.from_pylist(rows) for rows in (groups, slices)]
        shown = {("train.tfrecord", 1): Shown("text", "Muddy waters")}
        made = influence_page(table(0), shown, RUN, groups=tables[0], slices=tables[1])
        page = Page(made)
        assert "<script>alert" not in made
        # By name; the error of one that is not known is left out.
        assert page.texts("td") == ["−0.2500", "−0.2500 ± 0.2000", "+0.5000", "+0.5000 ± 0.2000"]
        clear = [cell.get("class", "") for cell in page.all("td")]
        assert [("clear" in c, "proponent" in c) for c in clear] == [
            *((False, False), (False, False), (False, True), (True, True))
        ]
        assert "not known" in page.text
        assert "the mean of these 17 most" in page.text
        assert page.text.index("Muddy waters") < page.text.index("test-0")

    def test_escapes_whatever_is_not_ours(self):
        rows = table(0, test_id=HOSTILE, train_id=HOSTILE)
        shown = {("test.tfrecord", 0): Shown("text", HOSTILE)}
        run = RUN | {"method": HOSTILE, "config": {HOSTILE: HOSTILE}, "versions": {HOSTILE: 1}}
        source = influence_page(rows, shown, run, label_names=[HOSTILE, HOSTILE])
        page = Page(source)
        assert len(page.all("script")) == 1  # its own, which the policy names
        assert "unsafe" not in str(page.all("meta"))
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
        assert ["data-wrong" in article for article in page.all("article")] == [True, False]
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
