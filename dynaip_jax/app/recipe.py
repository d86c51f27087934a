"""Arguments of `dynaip sample` from files: the settings of a picture (`--like`), run files and their presets (`--options`).

A file stands for words of the command line: what is given there wins over run files, later ones over earlier ones, and all over
the picture's settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from dynaip_jax.commandline import argument, flag
from dynaip_jax.errors import UserError

LARGEST = 1 << 20  # bytes of a run file
EITHER = (  # arguments that are replaced together
    {"reference", "subject"},
    {"seed", "random_seed", "noise", "noise_row"},
)
PLAIN = (str, int, float)


@dataclass(frozen=True)
class Sources:
    """Where other arguments may come from."""

    like: Path | None = argument(
        "draw this picture again, with the changes that other options make; it has to be as dynaip sample wrote it",
        default=None,
        unit="OUT.png",
    )
    options: tuple[Path, ...] = argument(
        "a file of options, such as `steps: 20`; later ones win, the command line over all",
        default=(),
        unit="RUN.yaml",
        repeat=True,
    )
    preset: str | None = argument("options under that name in `presets` of a run file", default=None, unit="NAME")


class Like(NamedTuple):
    """What is to be the same as in a picture: the fingerprints in its settings, and the file."""

    fingerprints: Mapping[str, Any] = {}
    file: str = ""

    def check(self, option: str, setting: str, found: Any) -> None:
        """Raises `UserError`, naming the option, if what was found is not what the picture was made with."""
        expected = self.fingerprints.get(setting, found)
        if found != expected:
            which = ""
            if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
                which = (
                    f" {1 + next(n for n, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])}"
                )
            raise UserError(
                f"`{option}`{which}: not what {self.file} was made with, its content is another; pass `{option}` to draw with it "
                "all the same"
            )


FINGERPRINTS = dict(  # argument -> settings that say what it was
    model=("base", "model_fingerprint"),
    adapter=("adapter_fingerprint",),
    lora=("lora_fingerprint",),
    reference=("reference_fingerprint",),
    mask=("mask_fingerprint",),
    native_reference=("native_reference_fingerprint",),
    noise=("noise_fingerprint",),
)


def complete(
    kind: type[Any], sources: Any, argv: Sequence[str], parse: Callable[[Sequence[str]], object]
) -> tuple[list[str], Like]:
    """The words of the command line with those that the files of `sources` stand for before them; and what `--like` asks for.

    `kind`: the dataclass of arguments; `parse` reads words. Raises `UserError` for files that cannot be read, and for options in
    them that do not fit, by the file's name.
    """
    if sources.preset is not None and not sources.options:
        raise UserError("`preset`: given without a run file; pass --options RUN.yaml, or leave it out")
    layers = [(str(path), _run_file(path, sources.preset)) for path in reversed(sources.options)]
    if sources.preset is not None and not any(named for _, (_, named) in layers):
        raise UserError(f"`preset` {sources.preset}: in no run file; expected one of its `presets`; add it")
    values = [(file, plain | (named or {})) for file, (plain, named) in layers]
    like = Like()
    if sources.like is not None:
        settings, again = _settings(sources.like)
        values.append((str(sources.like), again))
        like = Like(settings, str(sources.like))
    taken = _with_others(_given(argv))
    words: list[str] = []
    for file, asked in values:
        if file == like.file:
            like = like._replace(fingerprints=_expected(like.fingerprints, taken))
        own = {name: value for name, value in asked.items() if name not in taken}
        said = _words(kind, own, file)
        try:
            parse(said)
        except UserError as e:
            raise UserError(f"{file}: {e}") from e
        words = [*said, *words]
        taken |= _with_others(own)
    return [*words, *argv], like


def _given(argv: Sequence[str]) -> set[str]:
    """Arguments that are on the command line."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def _with_others(names: Mapping[str, Any] | set[str]) -> set[str]:
    """Those names, and those that are replaced with them."""
    found = set(names)
    return found.union(*(group for group in EITHER if group & found))


def _expected(settings: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    """The fingerprints of what the picture's settings decide."""
    names = [name for argument, settings in FINGERPRINTS.items() if argument not in taken for name in settings]
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A picture's settings, and the arguments that they stand for."""
    from dynaip_jax import images
    from dynaip_jax.sampling.settings import replay

    settings = images.read_settings(path)
    values = replay(settings, str(path))
    words = values.pop("words", ())
    if words and all(words):  # where some have none, they change nothing
        pairs = zip(values.pop("reference"), words, strict=True)
        values["subject"] = [f"{picture}={word}" for picture, word in pairs]
    if _is_embedded(settings):
        values.pop("model", None)
        if settings.get("adapter_fingerprint") == _embedded_adapter():
            values.pop("adapter", None)
    return settings, values


def _is_embedded(settings: Mapping[str, Any]) -> bool:
    """Whether a picture was made with the model in the package, wherever that lay."""
    from dynaip_jax.shapeland import default
    from dynaip_jax.storage.identity import identity
    from dynaip_jax.storage.manifest import BUNDLE_FILE

    return settings.get("model_fingerprint") == identity(_json(default.paths()[0] / BUNDLE_FILE))


def _embedded_adapter() -> str:
    from dynaip_jax.shapeland import default
    from dynaip_jax.storage.adapter import ADAPTER_WEIGHTS
    from dynaip_jax.storage.identity import identity
    from dynaip_jax.storage.manifest import ADAPTER_FILE

    folder = default.paths()[1]
    return identity(_json(folder / ADAPTER_FILE), folder / ADAPTER_WEIGHTS)


def _json(path: Path) -> Any:
    import json

    return json.loads(path.read_text())


def _run_file(path: Path, preset: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The options of a run file, and those under the name of a preset (None: it has no such)."""
    import yaml

    expected = "expected lines such as `steps: 20`"
    try:
        with path.open("rb") as stream:
            text = stream.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"`options` {path}: more than {LARGEST} bytes; {expected}; check the path")
        content = yaml.safe_load(text.decode())
    except OSError as e:
        raise UserError(f"`options` {path}: cannot be read ({e.strerror or e}); {expected}; check the path") from e
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"`options` {path}: not YAML ({reason}); {expected}; mend it") from e
    content = _mapping({} if content is None else content, f"`options` {path}")
    presets = _mapping(content.pop("presets", None) or {}, f"`options` {path}: presets")
    if preset is None or preset not in presets:
        return _names(content), None
    return _names(content), _names(_mapping(presets[preset] or {}, f"`options` {path}: preset {preset}"))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: found {type(value).__name__}; expected lines such as `steps: 20`; mend it")
    return value


def _names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in values.items()}


def _words(kind: type[Any], values: Mapping[str, Any], file: str) -> list[str]:
    """The words of the command line that say the same."""
    fields = {
        f.name: f for f in dataclasses.fields(kind) if f.name not in {f.name for f in dataclasses.fields(Sources)}
    }
    hints = get_type_hints(kind)
    words: list[str] = []
    for name, value in values.items():
        if name not in fields:
            raise UserError(
                f"{file}: {name}: no such option; expected a name that dynaip sample --help lists; correct it"
            )
        if value is None:
            continue
        if fields[name].default is False:
            if not isinstance(value, bool):
                raise UserError(f"{file}: `{name}` {value!r}: expected true or false")
            words += [flag(name)] * value
            continue
        texts = [str(item) for item in _items(name, value, file)]
        several = any(get_origin(hint) is tuple for hint in (hints[name], *get_args(hints[name])))
        if several and not fields[name].metadata["repeat"]:
            words += [flag(name), *texts]
        else:
            words += [f"{flag(name)}={text}" for text in texts]
    return words


def _items(name: str, value: Any, file: str) -> list[Any]:
    """A value, or the values of a list, in which there may be lists."""
    items = value if isinstance(value, list) else [value]
    flat = [x for item in items for x in (item if isinstance(item, list) else [item])]
    for item in flat:
        if isinstance(item, bool) or not isinstance(item, PLAIN):
            found = str(item).lower() if isinstance(item, bool) else type(item).__name__
            raise UserError(f"{file}: `{name}`: found {found}; expected a number, or text (in quotes); mend it")
    return flat
