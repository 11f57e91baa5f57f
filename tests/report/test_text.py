"""The terminal summary."""

import pyarrow as pa
from influence_table import HOSTILE, RUN, table

from tracin_beam.report.text import influence_summary


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
