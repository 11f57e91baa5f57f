"""What a run joins, for the jobs that need more than each example by itself."""

import dataclasses

from tracin_beam.errors import InputError
from tracin_beam.jobs.preflight import Run
from tracin_beam.scoring import curvature, methods
from tracin_beam.stages.joining import Join

# Of queries' written out gradients that are held together.
_QUERY_BYTES = 256 << 20


def join_of(run: Run) -> Join:
    """The Join of a run, with no queries where the job has no test set.

    Raises:
      InputError: embeddings are too long for the preconditioner, or it needs factors of gradients
        that have none.
    """
    config, engine = run.config, run.source.get().engine
    if config.preconditioner == "kfac" and config.gradient == "adam":
        raise InputError(
            "--preconditioner=kfac needs the factors of gradients, which they have no more when "
            "--gradient=adam has scaled them number by number: take --preconditioner=projected."
        )
    join = Join(
        run.output,
        run.train,
        run.test,
        config.test_name,
        config.target,
        run.checkpoints,
        run.source,
        run.shard_fingerprints,
        methods.of_preconditioner(config.preconditioner),
        engine.dim * len(run.checkpoints),
        engine.batch_size,
        config.damping,
    )
    if join.score.preconditioner != "none" and engine.dim > curvature.LONGEST:
        raise InputError(
            f"--preconditioner={config.preconditioner} takes embeddings of at most "
            f"{curvature.LONGEST} numbers, of which it inverts the second moments; they have "
            f"{engine.dim}: give a smaller --dim."
        )
    if join.score.written_out:
        size = 4 * sum(spec.size for spec in engine.specs)
        join = dataclasses.replace(join, block=max(1, min(join.block, _QUERY_BYTES // size)))
    return join
