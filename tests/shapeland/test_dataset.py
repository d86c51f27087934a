"""Shapeland's training data: what the trainer reads, and how much captions tell."""

from dynaip_jax import images
from dynaip_jax.data.records import Dataset, write_dataset
from dynaip_jax.shapeland.dataset import pair_record, scene_record
from dynaip_jax.shapeland.world import PATTERNS, SIZE


def test_records_are_those_of_the_trainer(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    records = [pair_record(0, n) for n in range(3)] + [pair_record(0, 3, reference="same")]
    assert write_dataset(folder, records) == 4
    dataset = Dataset(folder)
    assert dataset.masked.all() and (dataset.sizes == SIZE).all()
    target, reference = (images.load_image("x", data=x) for x in (dataset[0].target, dataset[0].reference))
    assert target.shape == reference.shape and (target != reference).any()
    assert dataset[3].reference == b"" and dataset[0].subject.split()[-1] in dataset[0].caption
    mask = images.load_image("x", data=dataset[0].mask)
    assert 0.1 < (mask > 127).mean() < 0.7  # a close view


def test_a_base_reads_looks_in_some_captions_only():
    captions = [scene_record(0, n).caption for n in range(60)]
    told = [c for c in captions if set(c.split()) & set(PATTERNS)]
    assert 5 < len(told) < 25
