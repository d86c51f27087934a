"""ICC profiles made by hand: one curve for all channels, and sRGB's primaries."""

import struct

D50 = (0.9642, 1.0, 0.8249)
PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))  # of sRGB, at D50


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space="RGB ", gamma=1.8, primaries=PRIMARIES):
    """A profile of version 2 for `space` ("RGB " or "GRAY") whose curve is x ** `gamma`, or about sRGB's for None."""
    points = [round(gamma * 256)] if gamma else [round(decoded((n / 1023) ** 1.01) * 65535) for n in range(1024)]
    curve = b"curv\0\0\0\0" + struct.pack(f">I{len(points)}H", len(points), *points) + bytes(2 * (len(points) % 2))
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = [
        (b"desc", text + bytes(-len(text) % 4)),
        (b"wtpt", b"XYZ \0\0\0\0" + fixed(*D50)),
        (b"cprt", b"text\0\0\0\0x\0\0\0"),
    ]
    if space == "GRAY":
        tags.append((b"kTRC", curve))
    else:
        for letter, xyz in zip(b"rgb", primaries, strict=True):
            tags += [(bytes([letter]) + b"XYZ", b"XYZ \0\0\0\0" + fixed(*xyz)), (bytes([letter]) + b"TRC", curve)]
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"\0\0\0\0", 0x02400000, b"mntr", space.encode(), b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + fixed(*D50)
    return header.ljust(128, b"\0") + table + body


def encoded(linear):
    """sRGB's curve, [0, 1] -> [0, 1]."""
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def decoded(value):
    """The inverse of `encoded`."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
