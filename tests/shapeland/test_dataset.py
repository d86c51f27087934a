"""Shapeland's training data: what the trainer reads, and how much captions tell."""

import numpy as np
import pytest

from dynaip_jax import images
from dynaip_jax.data.records import Dataset, write_dataset
from dynaip_jax.shapeland import dataset
from dynaip_jax.shapeland.dataset import pair_record, scene_record
from dynaip_jax.shapeland.world import LIGHTS, PATTERNS, SIZE, is_large


def test_records_are_those_of_the_trainer(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    records = [pair_record(0, n, references={"other": 1.0}, unsaid=0) for n in range(3)]
    records.append(pair_record(0, 3, references={"same": 1.0}))
    assert write_dataset(folder, records) == 4
    written = Dataset(folder)
    assert written.masked.all() and (written.sizes == SIZE).all()
    target, reference = (images.load_image("x", data=x) for x in (written[0].target, written[0].reference))
    assert target.shape == reference.shape and (target != reference).any()
    assert written[3].reference == b"" and written[0].subject.split()[-1] in written[0].caption
    mask = images.load_image("x", data=written[0].mask)
    assert 0.1 < (mask > 127).mean() < 0.7  # a close view


def test_a_base_reads_looks_in_some_captions_only():
    captions = [scene_record(0, n).caption for n in range(60)]
    told = [c for c in captions if set(c.split()) & set(PATTERNS)]
    assert 5 < len(told) < 25


def test_a_base_that_is_trained_with_an_adapter_has_references():
    """A twin for most scenes of one subject; all others are their own reference."""
    records = [scene_record(0, n) for n in range(200)]
    alone = [record for record in records if record.mask]
    assert 0.45 < np.mean([record.reference != b"" for record in alone]) < 0.75
    assert not any(record.reference for record in records if not record.mask) and len(alone) < 200


def test_captions_leave_parts_open_half_the_time_or_never():
    for record in (scene_record, pair_record):
        texts = [record(0, n).caption for n in range(200)]
        assert 0.35 < np.mean([any(f" at {light}" in text for light in LIGHTS) for text in texts]) < 0.65
        whole = [record(0, n, unsaid=0).caption for n in range(20)]
        assert all(any(f" at {light}" in text for light in LIGHTS) for text in whole)


def test_references_are_of_four_kinds(monkeypatch):
    """The scene itself; a close view in its setting; with the scene's background or light; a close view in a setting of its own."""
    assert sum(dataset.REFERENCES.values()) == 1
    seen = {}
    monkeypatch.setattr(dataset, "_record", lambda n, scene, reference, text: (scene, reference))
    for kind in dataset.KINDS:
        seen[kind] = [pair_record(0, n, references={kind: 1.0}) for n in range(60)]
    assert {reference for _, reference in seen["same"]} == {None}
    assert all((a.background, a.light) == (b.background, b.light) for a, b in seen["twin"])
    for kind, least, most in (("twin", 1, 1), ("shared", 1, 1), ("other", 0.25, 0.75)):
        pairs = seen[kind]
        assert all(a.subjects[0].identity == b.subjects[0].identity and is_large(b.subjects[0]) for a, b in pairs)
        assert least <= np.mean([a.background == b.background or a.light == b.light for a, b in pairs]) <= most
    with pytest.raises(ValueError, match="reference 'mine': expected one of"):
        pair_record(0, 0, references={"mine": 1.0})
