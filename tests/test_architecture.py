"""Imports run one way and without circles, heavy ones wait, backbones are named in their own files: read off the source."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # room of dynaip_jax: the rooms it may import, besides itself and files at the top
    "runtime": (),
    "storage": (),
    "images": (),
    "layers": ("runtime",),
    "models": ("layers", "runtime"),
    "data": ("images", "storage"),
    "adapters": ("layers", "runtime"),
    "families": ("models", "layers", "storage", "runtime"),
    "sampling": ("families", "adapters", "layers", "images", "storage", "runtime"),
    "jobs": ("sampling", "families", "images", "storage", "runtime"),
    "eval": (),
    "measuring": ("jobs", "sampling", "eval", "families", "models", "layers", "images", "storage", "runtime"),
    "planner": ("sampling", "families", "adapters", "layers", "storage", "runtime"),
    "shapeland": (
        "sampling",
        "eval",
        "data",
        "families",
        "adapters",
        "models",
        "layers",
        "images",
        "storage",
        "runtime",
    ),
    "app": (
        "shapeland",
        "measuring",
        "jobs",
        "sampling",
        "eval",
        "planner",
        "families",
        "adapters",
        "images",
        "storage",
        "runtime",
    ),
}
TOP = {
    "testing": ("families", "adapters", "models", "layers", "storage"),
    "": ("sampling", "images", "runtime"),
}  # files at the top that may
PACKAGES = {"dynaip_jax": (), "tools": ("dynaip_jax",), "train": ("dynaip_jax",), "configs": ("dynaip_jax", "train")}
WITHOUT_JAX = (
    "choices",
    "errors",
    "commandline",
    "version",
    "sampling.options",
    "sampling.sweeping",
    "images",
    "data",
    "app.controls",
    "app.turns",
)
GRAIN = "dynaip_jax.data.loader"  # subclasses a class of grain, so it is itself imported late
PAGE = "dynaip_jax.app.page"  # is nothing without gradio, and imported late too
LAZY = (
    GRAIN,
    PAGE,
    "transformers",
    "grain",
    "tensorflow_datasets",
    "pyarrow",
    "matplotlib",
    "gradio",
    "starlette",
    "scipy",
    "tqdm",
    "tensorboard",
    "qwix",
    "tyro",
)
PICKLES = "dynaip_jax.storage.pickled"  # torch alone reads them
BACKBONES = ("flux",)  # words that name a backbone
NAMED_IN = (  # where such a word may stand: a backbone's own files, its recipes, what is about it alone
    r"dynaip_jax/(models|families)/\w+\.py", r"dynaip_jax/testing\.py", r"tools/convert_torch_weights/(flux\w*|registry)\.py", r"configs/.*",
    r"benchmarks/.*", r"train/shapeland/configs\.py",
)  # fmt: skip
EXAMPLE = re.compile(r"(bundles|configs|runs|caches)/flux[\w.-]*|FLUX\.1[\w.-]*/")  # paths in help texts
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def modules():
    for top in (*PACKAGES, "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(path, top_level_only=False):
    """Full names that a file imports: of modules, and of what is taken from them."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starts(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def own(path):
    """Modules of the project that a file imports."""
    return {name for name in imports(path) if name in MODULES}


def room_of(name):
    """Of a module of dynaip_jax: its room, None for files at the top."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    for name, path in MODULES.items():
        if starts(name, package):
            outside = {m for m in own(path) if not starts(m, package)}
            assert {m.split(".")[0] for m in outside} <= set(PACKAGES[package]), f"{name} imports {outside}"


def test_rooms_import_one_way():
    for name, path in MODULES.items():
        if not starts(name, "dynaip_jax"):
            continue
        room, top = room_of(name), name.removeprefix("dynaip_jax").removeprefix(".")
        allowed = ROOMS[room] if room else TOP.get(top, ())
        for used in own(path):
            if starts(used, "dynaip_jax") and (other := room_of(used)) not in (None, room):
                assert other in allowed, f"{name} imports {used}"


def test_there_is_no_circle():
    graph = {name: own(path) - {name} for name, path in MODULES.items()}
    graph["dynaip_jax"] = set()  # it imports a name when that is used
    done = set()

    def walk(name, chain):
        assert name not in chain, f"circle: {' -> '.join([*chain, name])}"
        if name not in done:
            for used in graph[name]:
                walk(used, [*chain, name])
            done.add(name)

    for name in graph:
        walk(name, [])


def test_no_import_by_string():
    for name, path in MODULES.items():
        text = path.read_text()
        for way in ("import_module", "__import__", "sys.path"):
            assert way not in text, f"{name}: {way}"


def test_no_part_changes_the_warnings_of_all_threads():
    """But the frame of commands, whose process it is."""
    for name, path in MODULES.items():
        if name == "dynaip_jax.commandline":
            continue
        for way in ("catch_warnings", "simplefilter", "filterwarnings"):
            assert way not in path.read_text(), f"{name}: {way}"


def test_no_jax_where_commands_answer_at_once():
    for name, path in MODULES.items():
        if any(starts(name, f"dynaip_jax.{part}") for part in WITHOUT_JAX):
            assert not any(starts(m, "jax") or starts(m, "flax") for m in imports(path)), name


def test_no_torch_outside_the_oracle():
    for name, path in MODULES.items():
        if not starts(name, "benchmarks") and name != PICKLES:
            assert not any(starts(m, "torch") or starts(m, "diffusers") for m in imports(path)), name


def test_heavy_libraries_wait_until_they_are_needed():
    for name, path in MODULES.items():
        if starts(name, "dynaip_jax"):
            heavy = [m for m in imports(path, top_level_only=True) if any(starts(m, lazy) for lazy in LAZY)]
            assert heavy == {GRAIN: ["grain"], PAGE: ["gradio"]}.get(name, []), f"{name} imports {heavy} at the top"


def test_backbones_are_named_in_their_own_files():
    """In code and texts that users read; comments and docstrings may cite a source."""
    for path in MODULES.values():
        where = path.relative_to(ROOT).as_posix()
        if any(re.fullmatch(pattern, where) for pattern in NAMED_IN):
            continue
        for line, text in code(path):
            words = EXAMPLE.sub("", text).lower()
            assert not any(word in words for word in BACKBONES), f"{where}:{line}: {text.strip()[:80]}"


def code(path):
    """(line number, text) of the tokens of a file without its docstrings, import lines and comments."""
    text = path.read_text()
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            skipped |= set(range(first.lineno, first.end_lineno + 1))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and path.name == "registry.py":
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT and token.start[0] not in skipped:
            yield token.start[0], token.string


def test_files_and_functions_are_short():
    for name, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= LONGEST_FILE, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{name}.{node.name}"


PACKAGE_OF = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
}
NOT_IMPORTED = {"importlib_resources", "jinja2", "sentencepiece", "protobuf"}  # needed by others, as setup.py says
OPTIONAL = {
    "gguf",
    "google",
    "gradio",
    "starlette",
    "matplotlib",
    "qwix",
    "skimage",
    "torch",
}  # of an extra, or asked for where they are needed


def test_what_is_imported_is_declared_and_the_reverse():
    setup = (ROOT / "setup.py").read_text()
    block = setup[setup.index("install_requires=[") : setup.index("extras_require")]
    declared = {re.split(r"[\[><=]", name)[0] for name in re.findall(r'^ +"([^"]+)"', block, re.M)}
    used = set()
    for name, path in MODULES.items():
        if starts(name, "dynaip_jax") or starts(name, "train") or starts(name, "tools"):
            tops = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - {*PACKAGES, "__future__"}
            used |= {PACKAGE_OF.get(top, top) for top in tops}
    assert used - OPTIONAL <= declared, used - OPTIONAL - declared
    assert declared - NOT_IMPORTED <= used, declared - NOT_IMPORTED - used
