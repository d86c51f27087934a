"""All tests run on CPU with full float32 products, offline."""

import ctypes
import fcntl
import gc
import importlib
import os
import pkgutil
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a command in the background; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Programs of tests run for moments: optimising them, and code generators that are slow themselves, would take most of the time.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# Compiled programs, and folders that take long to make, are shared by the workers and children of a run of the tests; nothing is left in
# the user's cache.
SHARED, OWNER = "DYNAIP_TESTS_SHARED", os.environ.get("PYTEST_XDIST_WORKER") is None
if OWNER:
    os.environ[SHARED] = tempfile.mkdtemp(prefix="dynaip_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(os.environ[SHARED], "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(
    2**32
)  # as commands have it: a folder with and without a limit does not mix

# E402: what is imported from here on reads the variables above, or is to be checked by the hook below
import jaxtyping  # noqa: E402

import tests.typechecked  # noqa: E402, F401  (named below)

# Array shapes in annotations are checked wherever tests reach them. The modules are read now: read late, beside a thread that prints a
# traceback, CPython 3.11 may fail with "AST constructor recursion depth mismatch".
CHECKED = ("dynaip_jax.data", "dynaip_jax.images", "dynaip_jax.layers")
jaxtyping.install_import_hook(list(CHECKED), "tests.typechecked.check")
for package in CHECKED:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)

import jax  # noqa: E402
import pytest  # noqa: E402
import skimage.data  # noqa: E402
from PIL import Image  # noqa: E402

from dynaip_jax import tasks  # noqa: E402
from dynaip_jax.app import main as cli  # noqa: E402
from dynaip_jax.commandline import run_cli  # noqa: E402
from dynaip_jax.testing import make_adapter, make_bundle  # noqa: E402
from tests.fake_bucket import fake_bucket, served  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
MAPS, MEMORY = 25_000, 2.5e9  # a module takes up to 14,000 maps


def pytest_addoption(parser):
    """Pictures of the documentation that a test makes."""
    parser.addoption("--screenshots", metavar="FOLDER", help="where tests of the page put pictures of it")


def pytest_unconfigure(config):
    """What is shared goes with the process that made it."""
    if OWNER:
        shutil.rmtree(os.environ[SHARED], ignore_errors=True)


def made_once(name, make):
    """The folder `name` as `make(folder)` fills it, for all workers; nobody writes to it afterwards."""
    folder = Path(os.environ[SHARED], name)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = folder.with_name(f"{name}.new")
            new.mkdir()
            make(new)
            new.rename(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs stay for the modules after, until they are many: each holds memory, and memory maps, of which Linux gives a
    process 65530."""
    yield
    maps = len(Path("/proc/self/maps").read_bytes().splitlines())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if maps > MAPS or pages * os.sysconf("SC_PAGE_SIZE") > MEMORY:
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's: memory goes back to the system
            trim(0)


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """Those that a slow machine would add to what commands say."""
    monkeypatch.setattr(tasks, "EVERY", 3600.0)


def make_tiny(folder, family):
    make_bundle(folder / "bundle", family)
    make_adapter(folder / "adapter", folder / "bundle")


@pytest.fixture(scope="session")
def tiny():
    """(bundle folder, adapter folder) of random weights."""
    folder = made_once("tiny", lambda folder: make_tiny(folder, "flux"))
    return folder / "bundle", folder / "adapter"


@pytest.fixture(scope="session")
def tiny2():
    """The same of the second family."""
    folder = made_once("tiny2", lambda folder: make_tiny(folder, "flux2"))
    return folder / "bundle", folder / "adapter"


@pytest.fixture(scope="session")
def photograph(tmp_path_factory):
    """A real photograph, not square (400 x 600), as a file."""
    path = tmp_path_factory.mktemp("pictures") / "coffee.jpg"
    Image.fromarray(skimage.data.coffee()).save(path)
    return path


@pytest.fixture
def bucket():
    """The address of an empty bucket in memory, "gs://...": what storage reads and writes through etils.epath."""
    with fake_bucket() as address:
        yield address


@pytest.fixture
def served_bucket():
    """The same, which tensorstore reads and writes too."""
    with fake_bucket() as address, served():
        yield address


@pytest.fixture
def dynaip(capsys):
    """Runs the `dynaip` command in this process -> (exit status, stdout, stderr)."""

    def run(*words):
        status = run_cli(cli.run, [str(w) for w in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
