"""The nightly job as an Airflow DAG: copy it into the DAG folder.

The task runs the launcher, which goes wherever the configuration's `runner` says: on the Airflow
worker, or to Flink, Spark or Dataflow. tracin-beam stands in a virtual environment of its own, as
TensorFlow and Airflow do not share one.
"""

from datetime import UTC, datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

JOB = "quality"
PYTHON = "/opt/tracin-beam/bin/python"
CONFIG = "/etc/tracin-beam/nightly.yaml"

NO_RETRY = [2, 3]  # an input to be mended, or an error gate: trying again does not help


class Job(BashOperator):
    """A command that fails at once, whatever its retries, with one of some exit statuses."""

    def execute(self, context):
        try:
            return super().execute(context)
        except AirflowSkipException as error:
            raise AirflowFailException("no retry would help, see the log") from error


with DAG(
    dag_id="tracin_beam_nightly",
    description="What is wrong with the training data, embedding that of the day",
    schedule="15 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # one run takes all that has arrived since the last
    max_active_runs=1,
    tags=["tracin-beam"],
):
    Job(
        task_id="nightly",
        bash_command=f"{PYTHON} -m tracin_beam {JOB} --config={CONFIG}",
        skip_on_exit_code=NO_RETRY,
        retries=2,  # a retry goes on where the try before it stopped
        retry_delay=timedelta(minutes=15),
        execution_timeout=timedelta(hours=20),
    )
