"""What tells one folder of weights from another."""

from dynaip_jax.storage.folders import as_path
from dynaip_jax.storage.identity import identity


def test_content_decides_and_place_does_not(tmp_path, bucket):
    (tmp_path / "a").write_bytes(b"weights")
    there = as_path(f"{bucket}/b")
    there.write_bytes(b"weights")
    one = identity(dict(a=1, b=[2]), tmp_path / "a")
    assert one == identity(dict(b=[2], a=1), there) and len(one) == 64
    (tmp_path / "a").write_bytes(b"weighty")
    others = [identity(dict(a=1, b=[2]), tmp_path / "a"), identity(dict(a=1, b=[2])), identity(dict(a=1, b=[3]), there)]
    assert len({one, *others}) == 4
