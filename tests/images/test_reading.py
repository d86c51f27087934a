"""One door: the same picture is the same, however it is handed over, and what is none is named."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dynaip_jax import images
from dynaip_jax.errors import UserError
from tests.images.profiles import encoded, profile


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        images.load_image(source, **options)
    message = str(caught.value)
    assert "expected" in message and "\n" not in message and len(message) < 300
    return message


def chunk(kind, body, checksum=None):
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png16(path, array, clear):
    """A 16-bit grey or RGB PNG `[H, W(, 3)]` with a transparent colour."""
    colour = 0 if array.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in array))
    trns = chunk(b"tRNS", np.asarray(clear, ">u2").tobytes())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + trns + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def turned(photo):
    """EXIF that asks for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return dict(exif=exif)


def pictures(folder, photo):
    """Files of every kind that is easily read wrongly."""
    whole = Image.fromarray(photo)
    alpha = whole.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.arange(451) * 255 // 450, (300, 1)).astype(np.uint8)))
    made = {
        "exif.jpg": (whole, turned(photo)),
        "exif.tif": (whole, turned(photo)),
        "alpha.png": (alpha, {}),
        "alpha.webp": (alpha, dict(lossless=True)),
        "grey16.png": (Image.fromarray(photo[..., 0].astype(np.uint16) * 257), {}),
        "palette.png": (alpha.quantize(32), {}),
        "grey.png": (whole.convert("L"), {}),
        "grey_alpha.png": (alpha.convert("LA"), {}),
        "bilevel.png": (whole.convert("1"), {}),
        "profile.png": (whole, dict(icc_profile=profile())),
        "profile.jpg": (whole.convert("CMYK"), {}),
        "profile_alpha.webp": (alpha, dict(lossless=True, icc_profile=profile(gamma=1.4))),
    }
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
    return [folder / name for name in made] + [
        png16(folder / "grey16_clear.png", photo[..., 0].astype(np.uint16) * 257, 1)
    ]


def test_a_file_its_bytes_and_what_pil_makes_of_it_are_one(tmp_path, photo):
    for path in pictures(tmp_path, photo):
        expected = images.load_image(path)
        late, early, stream = Image.open(path), Image.open(path), io.BytesIO()
        early.load()
        stream.write(path.read_bytes())  # and not rewound
        with open(path, "rb") as file:
            ways = [str(path), path.read_bytes(), bytearray(path.read_bytes()), stream, file, late, early]
            for way in ways:
                np.testing.assert_array_equal(images.load_image(way), expected, err_msg=f"{path.name} {type(way)}")
        assert late.size and early.getpixel((0, 0)) is not None  # still open, and as they were


def test_arrays_of_every_library_are_one(photo):
    import jax.numpy as jnp

    torch = pytest.importorskip("torch")
    unit = photo / 255
    exact = [
        photo,
        jnp.asarray(photo),
        torch.tensor(photo),
        torch.tensor(unit, requires_grad=True),
        unit,
        unit.astype("f"),
    ]
    for way in exact:
        image = images.load_image(way)
        assert image.dtype == np.uint8 and image.flags.writeable and image is not way
        np.testing.assert_array_equal(image, photo)
    for way in (jnp.asarray(unit, jnp.bfloat16), unit.astype(np.float16)):
        assert np.abs(images.load_image(way).astype(int) - photo).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda x: x.transpose(2, 0, 1), r"an array of shape \[3, 300, 451\], channels first; .*x.transpose\(1, 2, 0\)"),
        (lambda x: x[..., 0], r"an array of shape \[300, 451\]; expected \[H, W, 3\].*PIL.Image.fromarray"),
        (lambda x: x[..., :1], r"shape \[300, 451, 1\]"),
        (lambda x: np.dstack([x, x[..., 0]]), r"shape \[300, 451, 4\]"),
        (lambda x: x[None], r"shape \[1, 300, 451, 3\]"),
        (lambda x: x > 128, "an array of bool; expected uint8, or floats from 0 to 1"),
        (lambda x: x.astype(int), "an array of int64"),
        (lambda x: x.astype(float), "holds floats from 0 to 231; expected uint8, or floats from 0 to 1"),
        (lambda x: x / 127.5 - 1, "holds floats from -1 to 0.8"),
        (lambda x: x * np.nan, "holds NaN"),
        (lambda x: x[:0], "0 pixels; expected at least 8"),
        (lambda x: x[:5, :5], "5 x 5 pixels; expected at least 8"),
        (lambda x: x.astype(str), "an array of str"),
        (lambda x: x.tolist(), "found list; expected a path"),
        (lambda x: None, "found NoneType"),
        (lambda x: io.StringIO("text"), "found str"),
    ),
)  # fmt: skip
def test_arrays_of_another_meaning_are_named(photo, change, message):
    with pytest.raises(UserError, match=rf"^`references` 2: .*{message}"):
        images.load_images([photo, change(photo)], "references")


def test_one_picture_or_several(tmp_path, photo):
    path = tmp_path / "a.png"
    Image.fromarray(photo).save(path)
    for one in (path, str(path), Image.open(path), photo, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert len(images.load_images(one, "references")) == 1
    assert len(images.load_images(np.stack([photo] * 3), "references")) == 3
    assert len(images.load_images((p for p in [path, photo]), "references")) == 2
    assert images.load_images((), "references") == []
    with pytest.raises(UserError, match="`references`: found int; expected a path"):
        images.load_images(3, "references")


def test_the_limit_on_pixels_holds_for_arrays_and_pil_too(photo):
    for way in (photo, Image.fromarray(photo)):
        assert "at most 135299 in all" in refused(way, max_pixels=300 * 451 - 1)


def test_a_transparent_grey_of_16_bits(tmp_path, photo):
    grey = photo[..., 0].copy()
    grey[:100], grey[100:][grey[100:] == 7] = 7, 8
    wide = grey.astype(np.uint16) * 257
    expected = np.where(grey == 7, 255, grey)
    for clear, array in ((7 * 257, wide), ((7 * 257,) * 3, np.repeat(wide[..., None], 3, axis=-1))):
        image = images.load_image(png16(tmp_path / "a.png", array, clear))
        np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=-1))


def test_an_icc_profile_says_what_colours_mean(tmp_path, photo):
    curve = np.round([255 * encoded((value / 255) ** 1.8) for value in range(256)]).astype(int)
    assert np.abs(curve - np.arange(256)).max() > 15
    grey = np.repeat(photo[..., :1], 3, axis=-1)
    whole = Image.fromarray(photo)
    alpha = whole.copy()
    alpha.putalpha(Image.new("L", whole.size, 255))
    for picture, space, expected in (
        (whole, "RGB ", photo),
        (alpha, "RGB ", photo),
        (whole.convert("P", palette=Image.Palette.ADAPTIVE), "RGB ", None),
        (Image.fromarray(photo[..., 0]), "GRAY", grey),
        (Image.merge("LA", (Image.fromarray(photo[..., 0]), Image.new("L", whole.size, 255))), "GRAY", grey),
        (Image.fromarray(photo[..., 0].astype(np.uint16) * 257), "GRAY", grey),
    ):
        picture.save(tmp_path / "a.png", icc_profile=profile(space))
        expected = np.asarray(picture.convert("RGB")) if expected is None else expected
        found = images.load_image(tmp_path / "a.png").astype(int)
        assert np.abs(found - curve[expected]).max() <= 3, (picture.mode, space)


@pytest.mark.parametrize("icc", (b"no profile", profile()[:200], profile("GRAY"), profile("CMYK")))
def test_a_profile_that_is_broken_or_of_other_channels_is_ignored(tmp_path, photo, icc):
    for name in ("a.png", "a.webp"):
        Image.fromarray(photo).save(tmp_path / name, icc_profile=icc, lossless=True)
        np.testing.assert_array_equal(images.load_image(tmp_path / name), photo)


def test_pictures_in_srgb_stay_bit_for_bit(tmp_path, photo):
    """Also where their profile is sRGB by another name, whose curve is rounded otherwise."""
    Image.fromarray(photo).save(tmp_path / "a.png", icc_profile=profile(gamma=None))
    np.testing.assert_array_equal(images.load_image(tmp_path / "a.png"), photo)


# --- what cannot be read


def test_broken_metadata_refuses_no_picture(tmp_path, photo):
    """A turned picture is upright where its orientation can be read."""
    plain, upright = io.BytesIO(), np.rot90(photo, -1)
    Image.fromarray(photo).save(plain, "PNG")
    whole = plain.getvalue()
    header, rest = whole[:33], whole[33:]
    exif = chunk(b"eXIf", turned(photo)["exif"].tobytes()[6:])
    for name, between, expected in (
        ("EXIF that is none", chunk(b"eXIf", b"no TIFF at all"), photo),
        ("a wrong checksum", chunk(b"tEXt", b"a\0b", checksum=1), photo),
        ("text of another length", chunk(b"iTXt", b"\0"), photo),
        ("text that is no zip", chunk(b"zTXt", b"a\0\0no zip"), photo),
        ("text that unpacks to 100 MB", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), photo),
        ("a profile that unpacks to 100 MB", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))), photo),
        ("a wrong checksum beside good EXIF", exif + chunk(b"tEXt", b"a\0b", checksum=1), upright),
        ("EXIF with a wrong checksum", chunk(b"eXIf", b"II*\0", checksum=1), photo),
        ("no resolution", chunk(b"pHYs", b"\0"), photo),
    ):
        path = tmp_path / "a.png"
        path.write_bytes(header + between + rest)
        np.testing.assert_array_equal(images.load_image(path), expected, err_msg=name)


def test_broken_metadata_refuses_no_jpeg(tmp_path, photo):
    plain = io.BytesIO()
    Image.fromarray(photo).save(plain, "JPEG", **turned(photo))
    whole, expected = plain.getvalue(), images.load_image(plain.getvalue())
    assert expected.shape == (451, 300, 3)

    def segment(marker, body):
        return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body

    for name, extra in (
        ("Adobe's segment cut short", segment(0xEE, b"Adobe")),
        ("a comment", segment(0xFE, b"\xff\xfe")),
        ("resources of Photoshop", segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\xff")),
        ("a second picture that is none", segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
    ):
        found = images.load_image(whole[:2] + extra + whole[2:])
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_what_is_no_file_is_said_as_such(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert "folder.png: a folder; expected a picture" in refused(tmp_path / "folder.png")
    assert "not a plain file" in refused(tmp_path / "pipe.png")  # which would never answer
    for address in ("https://example.com/a.png", "data:image/png;base64,AAAA", "gs://bucket/a.png"):
        assert "an address, not a file" in refused(address) and "download it first" in refused(address)
    with pytest.raises(UserError, match="cannot be opened .File name too long"):
        images.load_image("a" * 260)
    assert "cannot be opened (embedded null byte)" in refused("a\0b")
    assert "no such file" in refused(tmp_path / "folder.png" / "a.png")


@pytest.mark.parametrize(
    ("kind", "brands"),
    (("HEIC", b"heic\0\0\0\0mif1heic"), ("HEIC", b"mif1\0\0\0\0mif1heic"), ("AVIF", b"avif\0\0\0\0avifmif1")),
)
def test_pictures_of_phones_are_named(tmp_path, monkeypatch, kind, brands):
    from dynaip_jax.images import reading

    monkeypatch.setattr(reading, "FORMATS", ("PNG", "JPEG"))
    path = tmp_path / "phone.jpg"
    path.write_bytes(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100))
    for way in (path, path.read_bytes()):
        assert f"a picture in {kind}, which is not read here" in refused(way) and "JPEG or PNG" in refused(way)


@pytest.mark.skipif("AVIF" not in images.FORMATS, reason="this Pillow reads no AVIF")
def test_avif(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.avif")
    assert np.abs(images.load_image(tmp_path / "a.avif").astype(int) - photo).mean() < 6
