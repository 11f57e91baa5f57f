"""What run.json says of a run, in words; every page and the terminal show it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracin_beam.report import words


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What run.json says of a run, as (name, value); what it does not say is left out."""
    facts = []
    if method := run.get("method"):
        facts.append(("Method", words.printable(method)))
    test_name = str(_dict(run, "config").get("test_name") or "test")
    for side, name in (("train", "Training data"), (test_name, "Test data")):
        if counts := _counts(_dict(_dict(run, "counts"), side)):
            facts.append((name, counts))
    if checkpoints := _checkpoints(run.get("checkpoints")):
        facts.append(("Checkpoints", checkpoints))
    if projection := _projection(_dict(run, "config")):
        facts.append(("Projection", projection))
    if damping := _damping(_dict(run, "damping")):
        facts.append(("Damping", damping))
    if clusters := _clusters(_dict(run, "clusters")):
        facts.append(("Clusters", clusters))
    if distinct := _distinct(_dict(run, "distinct")):
        facts.append(("Distinct examples", distinct))
    return facts + _retrieval(_dict(run, "retrieval"))


def _damping(damping: Mapping[str, Any]) -> str:
    if not isinstance(damping.get("value"), float | int):
        return ""
    chosen = "chosen by how halves of the training set agree" if "agreement" in damping else ""
    return " ".join(filter(None, [f"{damping['value']:g} × the mean eigenvalue,", chosen])).rstrip(
        ","
    )


def _clusters(clusters: Mapping[str, Any]) -> str:
    """How clusters were made: "by distance, 7 rounds, after which nothing moved"."""
    if not isinstance(clusters.get("rounds"), int):
        return ""
    made = [f"by {words.printable(clusters.get('by'))}", f"{clusters['rounds']} rounds"]
    return ", ".join([*made, *["after which nothing moved"] * bool(clusters.get("settled"))])


def _distinct(distinct: Mapping[str, Any]) -> str:
    """How many different training examples the top tens have, by role."""
    parts = [
        f"{role} {found['examples']:,} in {found['slots']:,} top 10 slots ({found['share']:.0%})"
        for role, found in distinct.items()
        if isinstance(found, Mapping) and found.get("share") is not None
    ]
    return ", ".join(parts)


def _dict(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    child = parent.get(key)
    return child if isinstance(child, Mapping) else {}


def _counts(counts: Mapping[str, Any]) -> str:
    read, embedded, rejected, shards = (
        counts.get(key) for key in ("read", "embedded", "rejected", "shards")
    )
    parts = []
    if embedded is not None:
        parts.append(f"{embedded:,} examples" + (f" of {read:,} read" if read is not None else ""))
    elif read is not None:
        parts.append(f"{read:,} examples read")
    if rejected is not None:
        parts.append(f"{rejected:,} rejected")
    if shards is not None:
        parts.append(f"{shards:,} shard" + ("" if shards == 1 else "s"))
    return ", ".join(parts)


def _checkpoints(checkpoints: object) -> str:
    if not isinstance(checkpoints, Sequence) or not checkpoints:
        return ""
    steps = [c["step"] for c in checkpoints if c.get("step") is not None]
    rates = [c["learning_rate"] for c in checkpoints if c.get("learning_rate") is not None]
    parts = [f"{len(checkpoints):,}"]
    if steps:
        parts.append(f"step {_span(steps, '{:,}'.format)}")
    if rates:
        parts.append(f"learning rate {_span(rates, '{:.4g}'.format)}")
    return ", ".join(parts)


def _span(values: Sequence[Any], write: Callable[[Any], str]) -> str:
    first, last = write(values[0]), write(values[-1])
    return first if first == last else f"{first} to {last}"


def _projection(config: Mapping[str, Any]) -> str:
    projection, dim, layers = (config.get(key) for key in ("projection", "dim", "layers"))
    if projection is None:
        return ""
    parts = [words.printable(projection)]
    if dim is not None and projection != "none":
        parts[0] += f" to {dim:,}"
    if layers is not None:
        parts.append(f"layers: {words.printable(layers)}")
    return ", ".join(parts)


def _retrieval(retrieval: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    k, queries = retrieval.get("k"), retrieval.get("queries")
    at = f"Recall@{k}" if k is not None else "Recall"
    over = f", over {queries:,} sampled test examples" if queries is not None else ""
    for role in ("proponents", "opponents"):
        recall, alone = (_dict(retrieval, role).get(key) for key in ("recall", "recall_projection"))
        parts = []
        if recall is not None:
            parts.append(f"{recall:.3f}")
        if alone is not None:
            parts.append(f"{alone:.3f} by projection alone")
        if parts:
            facts.append((f"{at}, {role}", ", ".join(parts) + over))
    correlation = _dict(retrieval, "correlation")
    parts = [
        f"{name.capitalize()} {correlation[name]:.3f}"
        for name in ("pearson", "spearman")
        if correlation.get(name) is not None
    ]
    if parts:
        facts.append(("Projected against exact", ", ".join(parts)))
    return facts
