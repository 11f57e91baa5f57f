"""A small influence table, a run.json to it, and a reader of pages."""

import html.parser

import pyarrow as pa

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

    VOID = frozenset({"meta", "img", "input", "line", "rect"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self._starts: list[int] = []
        self._texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
            self._starts.append(len(self.text))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._texts.append((tag, self.text[self._starts.pop() :]))

    def handle_data(self, data):
        if not {"style", "title", "script"} & set(self._open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        """The text in each element of a tag, on a line."""
        return [" ".join(text.split()) for name, text in self._texts if name == tag]
