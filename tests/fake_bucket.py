"""A bucket in memory that etils.epath takes for Google's: no folders, no renaming, nothing to map into memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]
    written: list = []  # names of the files, in the order in which they were written

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def mv(self, *args, **options):
        raise NotImplementedError("buckets rename nothing")

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            self.written.append(path)
        return super()._open(path, mode, **options)


@contextmanager
def fake_bucket() -> Iterator[str]:
    """The address of an empty bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeBucket, "store", {})
        patch.setattr(FakeBucket, "pseudo_dirs", [""])
        patch.setattr(FakeBucket, "written", [])
        patch.setattr(gpath, "_is_tf_installed", lambda: False)
        fsspec.register_implementation("gcs", FakeBucket, clobber=True)
        FakeBucket.clear_instance_cache()
        type(backend.fsspec_backend)._get_filesystem.cache_clear()
        yield "gs://bucket"
