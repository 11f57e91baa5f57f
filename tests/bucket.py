"""A bucket on this machine, and a tiny run whose shards, checkpoints and output are in it."""

import logging
import os
import socket
from pathlib import Path

import pytest
from tiny import Tiny

NAME = "tracin-test"
ROOT = f"gs://{NAME}"

# For processes of their own. Beam looks for credentials with retries that take half a minute. Each
# of its many clients asks for the bucket's place, for spans that nobody traces.
ANONYMOUS = """
from apache_beam.internal.gcp import auth
auth._Credentials._credentials_init = True
try:
    from google.cloud.storage._bucket_metadata_cache import BucketMetadataCache
except ImportError:  # of an earlier version
    pass
else:
    BucketMetadataCache.get_or_queue_fetch = lambda self, bucket_name: None
"""


@pytest.fixture(scope="module")
def bucket():
    """The bucket, empty; `STORAGE_EMULATOR_HOST` says where it is."""
    pytest.importorskip("google.cloud.storage", reason="needs apache-beam[gcp]")
    server = pytest.importorskip("gcp_storage_emulator.server", reason="needs the emulator")
    from apache_beam.internal.gcp import auth
    from gcp_storage_emulator.storage import Storage
    from google.cloud import storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth._Credentials, "_credentials_init", True)
        exec(ANONYMOUS, {})
        # What it knows of all objects, after each change, into its own memory.
        patch.setattr(Storage, "_write_config_to_file", lambda self: None)
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        with server.create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME):
            yield storage.Client.create_anonymous_client().bucket(NAME)


class TinyInBucket(Tiny):
    """As Tiny; its folder is copied to the bucket before a run, and the output back after it."""

    def __init__(self, bucket, folder, launch=None):
        self.bucket = bucket
        super().__init__(folder, launch, prefix=ROOT)

    def key(self, path):
        return str(path).lstrip("/")

    def path(self, name):
        return f"{ROOT}/{self.key(self.folder / name)}"

    def push(self):
        """Makes the bucket's input that of the folder; unchanged files are left as they are."""
        there = {blob.name: blob for blob in self.bucket.list_blobs(prefix=self.key(self.folder))}
        for path in self.folder.rglob("*"):
            if path.is_file() and self.out not in path.parents and path.suffix != ".py":
                blob = there.pop(self.key(path), None)
                if blob is None or blob.download_as_bytes() != path.read_bytes():
                    self.bucket.blob(self.key(path)).upload_from_filename(path)
        for name, blob in there.items():
            if not name.startswith(self.key(self.out)):
                blob.delete()

    def objects(self):
        """Name → blob of all that lies in the output directory."""
        prefix = self.key(self.out) + "/"
        return {
            blob.name.removeprefix(prefix): blob for blob in self.bucket.list_blobs(prefix=prefix)
        }

    def generations(self):
        return {name: blob.generation for name, blob in self.objects().items()}

    def pull(self):
        """Makes the folder's output that of the bucket."""
        objects = self.objects()
        for path in list(self.out.rglob("*")):
            if path.is_file() and str(path.relative_to(self.out)) not in objects:
                path.unlink()
        for name, blob in objects.items():
            path = Path(self.out, name)
            os.makedirs(path.parent, exist_ok=True)
            path.write_bytes(blob.download_as_bytes())

    def run(self, stage, **changes):
        self.push()
        status = super().run(stage, **changes)
        self.pull()
        return status
