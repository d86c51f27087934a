"""The three layouts on disk, and what is wrong with sources."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dynaip_jax import images
from dynaip_jax.data import sources
from dynaip_jax.data.check import BadRow, Limits, png
from dynaip_jax.data.records import Record
from dynaip_jax.errors import UserError
from tests.data.photos import CAPTIONS, checked, entries, pixels, write_lines

# --- manifest


def test_manifest(tmp_path):
    source = sources.read_manifest(write_lines(tmp_path, entries(tmp_path)))
    records = checked(source)
    assert source.entries == 4 and [r.number for r in records] == [1, 2, 3, 4]
    for record, (name, (caption, subject)) in zip(records, CAPTIONS.items(), strict=True):
        target, reference = pixels(record)
        np.testing.assert_array_equal(target, getattr(data, name)())
        np.testing.assert_array_equal(reference, data.rocket() if name == "coffee" else target)
        assert (record.caption, record.subject) == (caption, subject)
    assert [bool(r.reference) for r in records] == [False, False, True, False]
    mask = np.asarray(Image.open(io.BytesIO(records[1].mask)))
    np.testing.assert_array_equal(mask, np.asarray(Image.open(tmp_path / "mask.png")))
    assert records[0].mask == records[2].mask == b""
    assert records[0].target == (tmp_path / "astronaut.png").read_bytes()  # not encoded again


def test_manifest_may_be_named_by_its_folder_and_have_blank_lines(tmp_path):
    lines = entries(tmp_path)
    write_lines(tmp_path, ["", lines[0], "   ", lines[1]])
    assert [r.number for r in checked(sources.read_manifest(tmp_path))] == [2, 4]


GOOD = dict(reference="chelsea.png", target="chelsea.png", caption="a ginger cat", subject="cat")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"reference": ', "broken JSON"),
        ("[1, 2]", "JSON list"),
        ("[" * 100_000, "broken JSON"),
        ({k: v for k, v in GOOD.items() if k != "target"}, "missing fields ['target'], unknown fields []"),
        (GOOD | dict(masks="mask.png"), "missing fields [], unknown fields ['masks']"),
        (GOOD | dict(target=7), "target 7"),
        (GOOD | dict(target="a\0b"), "target 'a\\x00b'"),
        (GOOD | dict(target="x" * 5000), "name too long"),
        (GOOD | dict(target="missing.png"), "missing.png: no such file"),
        (GOOD | dict(reference="missing.png"), "missing.png: no such file"),
        (GOOD | dict(target="text.png"), "text.png: not a picture"),
        (GOOD | dict(target="cut.png"), "cut.png: cannot be decoded"),
        (GOOD | dict(target="tiny.png"), "tiny.png: tiny, 200 x 63 pixels; expected at least 64 a side"),
        (GOOD | dict(reference="tiny.png"), "tiny.png: tiny"),
        (GOOD | dict(target="huge.png"), "huge.png: a picture of 900 x 700 pixels; expected at most 600000"),
        (GOOD | dict(caption=""), "empty caption"),
        (GOOD | dict(caption=" \n"), "caption ' \\n'"),
        (GOOD | dict(subject=""), "empty subject"),
        (GOOD | dict(subject="dog"), "subject 'dog' is not in the caption 'a ginger cat'"),
        (GOOD | dict(subject="inge"), "subject 'inge' is not in"),
        (GOOD | dict(mask="mask.png", reference="coffee.png"), "a mask of 451 x 300 pixels; expected the reference's size, 600"),
        (GOOD | dict(mask="half.png"), "half.png: a mask of 225 x 150 pixels"),
        (GOOD | dict(mask="black.png"), "black.png: the mask is black everywhere"),
        (GOOD | dict(mask="missing.png"), "missing.png: no such file"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, line, reason):
    entries(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "coffee.png").read_bytes()[:5000])
    (tmp_path / "tiny.png").write_bytes(png(data.coffee()[:63, :200]))
    (tmp_path / "huge.png").write_bytes(png(np.zeros((700, 900, 3), np.uint8)))
    (tmp_path / "black.png").write_bytes(png(np.zeros((300, 451), np.uint8)))
    (tmp_path / "half.png").write_bytes(png(np.full((150, 225), 255, np.uint8)))
    first, bad, last = checked(sources.read_manifest(write_lines(tmp_path, [GOOD, line, GOOD])), Limits(64, 600_000))
    assert isinstance(first, Record) and isinstance(last, Record) and last.number == 3
    assert isinstance(bad, BadRow) and bad.number == 2 and reason.lower() in bad.reason.lower()
    assert "; " in bad.reason or "too long" in bad.reason


@pytest.mark.parametrize("field", ["caption", "subject", "target", "reference", "mask"])
def test_half_a_character_is_a_bad_row(tmp_path, field):
    """JSON can say a lone surrogate; it cannot be stored as UTF-8, nor be the name of a file."""
    good = entries(tmp_path)[0]
    bad = good | dict(caption="\ud83d " + good["caption"]) if field == "caption" else good | {field: "x\ud83d"}
    rows = checked(sources.read_manifest(write_lines(tmp_path, [good, bad, good])))
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert f"{field} '" in rows[1].reason and "half a character" in rows[1].reason and rows[1].reason.isprintable()


@pytest.mark.parametrize("subject", ["Ginger  CAT", "cat", "sofa"])
def test_subject_words_in_any_case_and_spacing(tmp_path, subject):
    entries(tmp_path)
    line = GOOD | dict(caption="my ginger  cat,\non a sofa.", subject=subject)
    (record,) = checked(sources.read_manifest(write_lines(tmp_path, [line])))
    assert record.subject == subject


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_manifest(tmp_path, content):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match="metadata.jsonl: empty; expected"):
        sources.read_manifest(tmp_path)
    with pytest.raises(UserError, match="metadata.jsonl: cannot be read"):
        sources.read_manifest(tmp_path / "missing" / "metadata.jsonl")


# --- subjects200k


def composite(border, gap):
    """A cat and an astronaut, 256 x 256 each, with white padding around and between."""
    left, right = data.chelsea()[20:276, 100:356], data.astronaut()[:256, 100:356]
    canvas = np.full((256 + 2 * border, 512 + 2 * border + gap, 3), 255, np.uint8)
    canvas[border : border + 256, border : border + 256] = left
    canvas[border : border + 256, border + 256 + gap : border + 512 + gap] = right
    return canvas, left, right


DESCRIPTION = dict(
    item="Ginger cat", description_0="A ginger cat indoors", description_1="A portrait", description_valid=True
)
SCORED = dict(compositeStructure=5, objectConsistency=4, imageQuality=5)


@pytest.mark.parametrize(("border", "gap"), [(8, 16), (16, 16), (8, 8), (0, 0)])
def test_subjects200k(tmp_path, border, gap):
    canvas, left, right = composite(border, gap)
    (tmp_path / "pair.png").write_bytes(png(canvas))
    source = sources.read_subjects200k(write_lines(tmp_path, [dict(image="pair.png", description=DESCRIPTION)]))
    first, second = checked(source)
    assert source.entries == 1 and first.number == second.number == 1
    np.testing.assert_array_equal(pixels(first), [left, right])
    np.testing.assert_array_equal(pixels(second), [right, left])
    assert (first.caption, first.subject) == ("A ginger cat indoors", "Ginger cat")
    assert (second.caption, second.subject) == ("A portrait", "")
    assert first.reference == second.reference == b""


def test_subjects200k_parquet_and_its_own_verdicts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = dict(bytes=png(composite(8, 16)[0]), path=None)
    scores = [SCORED, SCORED | dict(imageQuality=2), None, SCORED, SCORED]
    descriptions = [DESCRIPTION] * 3 + [
        DESCRIPTION | dict(description_valid=False),
        DESCRIPTION | dict(description_1=""),
    ]
    table = [
        dict(image=image, description=d, quality_assessment=s, collection="c")
        for d, s in zip(descriptions, scores, strict=True)
    ]
    (tmp_path / "data").mkdir()
    for n, part in enumerate((table[:2], table[2:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "data" / f"train-{n}.parquet")

    def numbers(quality):
        source = sources.read_subjects200k(tmp_path, quality)
        assert source.entries == 5
        return [(r.number, type(r)) for r in checked(source)]

    assert numbers(4) == [(1, Record), (1, Record), (5, BadRow)]
    assert numbers(5) == []
    assert numbers(0) == [(n, Record) for n in (1, 1, 2, 2, 3, 3)] + [(5, BadRow)]

    (tmp_path / "data" / "train-1.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match="train-1.parquet: not a whole parquet file"):
        sources.read_subjects200k(tmp_path)
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "data" / "train-1.parquet")
    with pytest.raises(UserError, match="expected image, description"):
        sources.read_subjects200k(tmp_path)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (dict(image="pair.png", description="a cat"), "not objects"),
        (dict(image="pair.png", description=DESCRIPTION | dict(description_0=None)), "description_0 None"),
        (dict(image=5, description=DESCRIPTION), "image 5"),
        (dict(image="single.png", description=DESCRIPTION), "300 pixels; expected two squares"),
        (dict(image="missing.png", description=DESCRIPTION), "no such file"),
    ],
)
def test_bad_subjects200k(tmp_path, entry, reason):
    (tmp_path / "pair.png").write_bytes(png(composite(8, 16)[0]))
    (tmp_path / "single.png").write_bytes(png(data.chelsea()))
    bad = checked(sources.read_subjects200k(write_lines(tmp_path, [entry])))
    assert bad and all(isinstance(b, BadRow) and b.number == 1 and reason in b.reason for b in bad)


# --- folder


def test_folder(tmp_path):
    entries(tmp_path)
    (tmp_path / "mask.png").unlink()
    (tmp_path / "rocket.png").rename(tmp_path / "Z.PNG")
    for name in ("astronaut", "chelsea", "Z"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}\n")
    source = sources.read_folder(tmp_path)
    records = checked(source)  # sorted: Z, astronaut, chelsea, coffee
    assert source.entries == 4
    assert [(r.number, r.caption) for r in records[:3]] == [
        (1, "this is Z"),
        (2, "this is astronaut"),
        (3, "this is chelsea"),
    ]
    np.testing.assert_array_equal(pixels(records[0]), [data.rocket()] * 2)
    assert isinstance(records[3], BadRow) and "coffee.txt: caption cannot be read" in records[3].reason
    (tmp_path / "coffee.txt").write_text("\n")
    assert "coffee.txt: empty caption" in checked(sources.read_folder(tmp_path))[3].reason
    (tmp_path / "coffee.txt").write_bytes(b"\xff\xfe\xff")
    assert "coffee.txt: caption cannot be read" in checked(sources.read_folder(tmp_path))[3].reason


def test_what_a_folder_has_beside_its_rows_is_said(tmp_path):
    entries(tmp_path)
    for name in ("a.HEIC", "b.heic", "c.heif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "linked").symlink_to(tmp_path.parent, target_is_directory=True)
    assert sources.read_folder(tmp_path).ignored == (
        f"{tmp_path}: 2 .heic, 1 .heif files are not read; convert them to PNG or JPEG to have them",
        f"{tmp_path}: links to folders are not followed: linked",
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.heic").write_bytes(b"x")
    with pytest.raises(UserError, match="no picture in it; .*1 .heic files are not read"):
        sources.read_folder(tmp_path / "only")


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="empty, no picture in it"):
        sources.read_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        sources.read_folder(tmp_path / "missing")


def test_every_suffix_is_of_a_format_that_is_read():
    formats = Image.registered_extensions()
    assert all(formats[s] in images.FORMATS for s in sources.SUFFIXES)
