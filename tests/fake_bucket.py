"""A bucket in memory that etils.epath takes for Google's: no folders, no renaming, nothing to map into memory."""

import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]
    written: list = []  # names of the files, in the order in which they were written
    removed: list = []  # likewise

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def mv(self, *args, **options):
        raise NotImplementedError("buckets rename nothing")

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            self.written.append(path)
        return super()._open(path, mode, **options)

    def rm_file(self, path):
        self.removed.append(self._strip_protocol(path))
        super().rm_file(path)


@contextmanager
def fake_bucket() -> Iterator[str]:
    """The address of an empty bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeBucket, "store", {})
        patch.setattr(FakeBucket, "pseudo_dirs", [""])
        patch.setattr(FakeBucket, "written", [])
        patch.setattr(FakeBucket, "removed", [])
        patch.setattr(gpath, "_is_tf_installed", lambda: False)
        fsspec.register_implementation("gcs", FakeBucket, clobber=True)
        FakeBucket.clear_instance_cache()
        type(backend.fsspec_backend)._get_filesystem.cache_clear()
        yield "gs://bucket"


class Storage(BaseHTTPRequestHandler):
    """As much of Google's JSON interface as tensorstore's client asks for, over the same bucket."""

    protocol_version = "HTTP/1.1"
    generations: dict = {}

    def do_GET(self):
        name, asked = self._asked()
        if name is None:
            names = [f"{n.removeprefix('/bucket/')}" for n in FakeBucket.store if n.startswith("/bucket/")]
            first, last, prefix = (asked.get(k, "") for k in ("startOffset", "endOffset", "prefix"))
            names = [n for n in sorted(names) if n.startswith(prefix) and n >= first and (not last or n < last)]
            return self._answer(200, json.dumps(dict(items=[dict(name=n, size="1") for n in names])).encode())
        if name not in FakeBucket.store:
            return self._answer(404)
        data, status, extent = FakeBucket.store[name].getvalue(), 200, None
        if "Range" in self.headers:
            start, _, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
            first = int(start) if start else len(data) - int(stop)
            part = data[first : int(stop) + 1 if start and stop else None]
            status, extent, data = 206, f"bytes {first}-{first + len(part) - 1}/{len(data)}", part
        self._answer(status, data, extent, self._generation(name))

    def do_POST(self):
        _, asked = self._asked()
        name, data = f"/bucket/{asked['name']}", self.rfile.read(int(self.headers["Content-Length"]))
        wanted = asked.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self._generation(name):
            return self._answer(412)
        self.generations[name] = self.generations.get(name, 0) + 1
        FakeBucket().pipe_file(name, data)
        self._answer(200, json.dumps(dict(name=asked["name"], generation=str(self._generation(name)))).encode())

    def do_DELETE(self):
        name, _ = self._asked()
        self._answer(404 if FakeBucket.store.pop(name, None) is None else 204)

    def _generation(self, name):
        return self.generations.setdefault(name, 1) if name in FakeBucket.store else 0

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        name = url.path.partition("/b/bucket/o/")[2]
        asked = dict(urllib.parse.parse_qsl(url.query))
        return f"/bucket/{urllib.parse.unquote(name)}" if name else None, asked

    def _answer(self, status, data=b"", extent=None, generation=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if extent:
            self.send_header("Content-Range", extent)
        if generation:
            self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def served() -> Iterator[None]:
    """Has tensorstore find the fake bucket too, on the loopback, and Orbax what it asks Google's client for."""
    client = SimpleNamespace(get_bucket=lambda name: SimpleNamespace(hierarchical_namespace_enabled=False))
    storage = SimpleNamespace(Client=lambda: client)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "generations", {})
        patch.setitem(sys.modules, "google.cloud", SimpleNamespace(storage=storage))
        patch.setitem(sys.modules, "google.cloud.storage", storage)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody")
        yield
    server.shutdown()
    server.server_close()
