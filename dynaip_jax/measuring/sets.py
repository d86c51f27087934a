"""What is to be drawn and measured: prompts with their subjects, from the folders of public benchmarks or from a list of one's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.sampling.options import shown

DREAMBENCH_FILE = "prompts_and_classes.txt"
DREAMBENCH, DREAMBENCH_PLUS = (30, 25), (150, 9)  # subjects, prompts of each
LIVE = ("cat", "dog")  # DreamBench's classes of live subjects, which have prompts of their own
TEMPLATE = re.compile(r"'([^'\n]*\{0\} \{1\}[^'\n]*)'\.format")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LARGEST, LINE, MOST = 1 << 26, 1 << 20, 100_000
FIELDS = {"prompt", "references", "words", "masks", "name"}
NAME = re.compile(r"[\w.-]{1,80}")
Layout = Literal["DreamBench", "DreamBench++", "own"]


class Subject(NamedTuple):
    """One subject: files of its pictures, of which the model is shown the first, the words of the prompt that name it ("" for none), and
    the file of the mask where it is to appear."""

    pictures: tuple[str, ...]
    words: str = ""
    mask: str | None = None


class Case(NamedTuple):
    """A prompt and its subjects. `name`: of its files, and in reports; `kind`: what of a subject is to be kept."""

    name: str
    prompt: str
    subjects: tuple[Subject, ...]
    kind: Literal["subject", "style"] = "subject"


class Set(NamedTuple):
    """The cases of a set, and lines worth showing. `name`: of the layout."""

    name: Layout
    cases: list[Case]
    notes: list[str]

    def fingerprint(self) -> str:
        """sha256 over all prompts, words, and the content of all pictures: the same wherever the set lies. Raises `UserError` for files that
        cannot be read."""
        digests: dict[str, str] = {}
        facts = []
        for case in self.cases:
            files = [[_digest(file, digests) for file in subject.pictures] for subject in case.subjects]
            masks = [_digest(s.mask, digests) if s.mask else None for s in case.subjects]
            facts.append([case.name, case.prompt, files, [s.words for s in case.subjects], masks, case.kind])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_set(path: Path) -> Set:
    """The set in a folder of DreamBench's or DreamBench++'s layout, or in a JSON lines file. Raises `UserError` for any other, and for a
    set that lacks pictures."""
    if not reading.is_dir(path):
        return _own(path)
    if reading.is_file(path / DREAMBENCH_FILE):
        return _dreambench(path)
    if reading.is_file(path / "dataset" / DREAMBENCH_FILE):
        return _dreambench(path / "dataset")
    if reading.is_dir(path / "images") and reading.is_dir(path / "captions"):
        return _dreambench_plus(path)
    raise UserError(
        f"`set` {path}: no set; expected {DREAMBENCH_FILE} (DreamBench), folders images and captions (DreamBench++), or a JSON lines file; "
        "check the path"
    )


def _dreambench(folder: Path) -> Set:
    """Subjects in folders of their own; prompts by class, without the token that stands for a subject elsewhere."""
    file = folder / DREAMBENCH_FILE
    text = _text(file)
    classes = re.findall(r"^([\w-]+),([\w -]+)$", text.partition("Prompts")[0], re.MULTILINE)
    classes = [(name, kind.strip()) for name, kind in classes if name != "subject_name"]
    parts = re.split(r"^Live Subject Prompts", text, maxsplit=1, flags=re.MULTILINE)
    prompts = [TEMPLATE.findall(part) for part in parts]
    if not classes or len(parts) != 2 or not all(prompts):
        raise UserError(
            f"{file}: no classes, or not both lists of prompts; expected DreamBench's own file; download it again"
        )
    cases = []
    for name, kind in classes:
        pictures = _pictures(folder / name, f"{file}: the subject {name}")
        for n, template in enumerate(prompts[kind in LIVE]):
            prompt = template.replace("{0} ", "").replace("{1}", kind)
            cases.append(Case(f"{name}.{n:02}", prompt, (Subject(pictures, kind),)))
    return Set("DreamBench", cases, _sizes("DreamBench", len(classes), map(len, prompts), DREAMBENCH))


def _dreambench_plus(folder: Path) -> Set:
    """A picture a subject in images/KIND/NN.jpg; in captions/KIND/NN.txt the subject's words, then a prompt a line."""
    captions = sorted((folder / "captions").rglob("*.txt"))
    if not captions:
        raise UserError(f"{folder / 'captions'}: holds no captions; expected KIND/NN.txt; download the set again")
    files = {p.relative_to(folder / "images").with_suffix(""): p for p in _files(folder / "images")}
    named = {caption.relative_to(folder / "captions").with_suffix("") for caption in captions}
    if lonely := sorted(files.keys() ^ named):
        lacks = "picture" if lonely[0] in named else "captions"
        raise UserError(
            f"`set` {folder}: {lonely[0]} has no {lacks} ({len(lonely)} lack theirs); expected images/KIND/NN.jpg and "
            "captions/KIND/NN.txt of each; download the set again"
        )
    cases, counts = [], []
    for caption in captions:
        place = caption.relative_to(folder / "captions").with_suffix("")
        words, *prompts = [line.strip() for line in _text(caption).splitlines() if line.strip()] or [""]
        if not prompts:
            raise UserError(
                f"{caption}: no prompts; expected the subject's words, then a prompt a line; download it again"
            )
        kind: Literal["subject", "style"] = "style" if place.parts[0] == "style" else "subject"
        for n, prompt in enumerate(prompts):
            own = words.lower() if kind == "subject" and words.lower() in prompt.lower() else ""
            cases.append(Case(f"{'.'.join(place.parts)}.{n}", prompt, (Subject((str(files[place]),), own),), kind))
        counts.append(len(prompts))
    return Set("DreamBench++", cases, _sizes("DreamBench++", len(captions), counts, DREAMBENCH_PLUS))


def _own(path: Path) -> Set:
    """A list: {"prompt", "references": one picture a subject or a list of several of each, "words", "masks", "name"} a line."""
    expected = 'expected lines such as {"prompt": "a cup and a dog", "references": ["cup.jpg", "dog.jpg"], "words": ["cup", "dog"]}'
    try:
        lines = reading.read_bytes(path, LARGEST).splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"`set` {path}: cannot be read ({reason(e)}); {expected}; check the path") from e
    cases: list[Case] = []
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = reading.parse_json(line, LINE)
        except ValueError as e:
            raise UserError(f"{where}: not JSON ({reason(e)}); {expected}; mend the line") from e
        case = _case(values, where, path.parent, f"{len(cases):04}")
        if names.setdefault(case.name, number) != number:
            raise UserError(
                f"{where}: `name` {case.name}: line {names[case.name]} has it too; expected one of its own; change it"
            )
        cases.append(case)
    if not cases or len(cases) > MOST:
        raise UserError(f"`set` {path}: {len(cases)} lines; expected at least one, and at most {MOST}; {expected}")
    return Set("own", cases, [])


def _case(values: Any, where: str, folder: Path, name: str) -> Case:
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f"{where}: `prompt`: missing, or no text; expected the prompt; add it")
    if unknown := sorted(values.keys() - FIELDS):
        raise UserError(f"{where}: `{unknown[0]}`: unknown; expected some of {', '.join(sorted(FIELDS))}; correct it")
    given = values.get("references", [])
    each = [one if isinstance(one, list) else [one] for one in (given if isinstance(given, list) else [given])]
    words, masks = (_list(values, field, where) for field in ("words", "masks"))
    for field, items in (("words", words), ("masks", masks)):
        if items and len(items) != len(each):
            raise UserError(
                f"{where}: `{field}`: {len(items)} for {len(each)} subjects; expected one each, or none; mend it"
            )
    if not each or not all(each) or not all(isinstance(file, str) and file for one in each for file in one):
        raise UserError(f"{where}: `references`: expected the files of at least one subject; add them")
    found = [tuple(_present(folder / file, where) for file in one) for one in each]
    own = values.get("name", name)
    if not isinstance(own, str) or not NAME.fullmatch(own):
        raise UserError(f"{where}: `name` {shown(own)}: expected letters, digits, dots, - and _, at most 80; change it")
    subjects = (
        Subject(
            pictures,
            words[n] if words else "",
            _present(folder / masks[n], where) if masks else None,
        )
        for n, pictures in enumerate(found)
    )
    return Case(own, values["prompt"], tuple(subjects))


def _list(values: dict[str, Any], field: str, where: str) -> list[str]:
    value = values.get(field, [])
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"{where}: `{field}` {shown(value)}: expected texts; mend it")
    return items


def _present(path: Path, where: str) -> str:
    if not reading.is_file(path):
        raise UserError(f"{where}: {path}: no such file; expected a picture; check the path, relative to the list")
    return str(path)


def _pictures(folder: Path, where: str) -> tuple[str, ...]:
    files = sorted(_files(folder)) if reading.is_dir(folder) else []
    if not files:
        raise UserError(
            f"{where}: no pictures in {folder}; expected some; download the set again, or take the line out"
        )
    return tuple(map(str, files))


def _files(folder: Path) -> Iterator[Path]:
    """The pictures in a folder and those in it."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in PICTURES and path.is_file():
            yield path


def _sizes(name: str, subjects: int, prompts: Any, published: tuple[int, int]) -> list[str]:
    counts = sorted(set(prompts))
    if (subjects, counts) == (published[0], [published[1]]):
        return []
    listed = " or ".join(map(str, counts))
    return [
        f"{subjects} subjects with {listed} prompts each; {name} has {published[0]} with {published[1]}: its numbers do not compare"
    ]


def _text(path: Path) -> str:
    try:
        return reading.read_bytes(path, LARGEST).decode()
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({reason(e)}); expected text in UTF-8; download it again") from e


def _digest(file: str, known: dict[str, str]) -> str:
    if file not in known:
        try:
            known[file] = hashlib.sha256(reading.read_bytes(Path(file), 1 << 30)).hexdigest()
        except (OSError, ValueError) as e:
            raise UserError(f"{file}: cannot be read ({reason(e)}); expected a picture of the set; check it") from e
    return known[file]


def chosen(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """The first of the cases, evenly taken from all of them; all without a `limit`."""
    if limit is None or limit >= len(cases):
        return list(cases)
    return [cases[n * len(cases) // limit] for n in range(limit)]
