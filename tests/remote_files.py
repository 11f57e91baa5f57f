"""A file system that is not local, for tests: remote:///tmp/x is /tmp/x."""

import os

from apache_beam.io.filesystem import BeamIOError, FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem

from tracin_beam.storage import files

PREFIX = "remote://"


def _local(path: str) -> str:
    return path.removeprefix(PREFIX)


class RemoteFileSystem(LocalFileSystem):
    """Does not rename over a file, and names files by their URL."""

    @classmethod
    def scheme(cls):
        return "remote"

    def split(self, path):
        head, tail = os.path.split(_local(path))
        return PREFIX + head, tail

    def _list(self, dir_or_prefix):
        for found in super()._list(_local(dir_or_prefix)):
            yield FileMetadata(PREFIX + found.path, found.size_in_bytes)

    def _path_open(self, path, *args, **kwargs):
        return super()._path_open(_local(path), *args, **kwargs)

    def create(self, path, *args, **kwargs):
        return super().create(_local(path), *args, **kwargs)

    def rename(self, source_file_names, destination_file_names):
        for source, destination in zip(source_file_names, destination_file_names, strict=True):
            if self.exists(destination):
                raise BeamIOError("Rename operation failed", {(source, destination): "exists"})
            os.rename(_local(source), _local(destination))

    def exists(self, path):
        return super().exists(_local(path))

    def metadata(self, path):
        return FileMetadata(path, super().metadata(_local(path)).size_in_bytes)

    def checksum(self, path):
        return "etag-" + files.checksum(_local(path))

    def delete(self, paths):
        for path in paths:
            os.remove(_local(path))
