"""Caches of random features, and caches as versions of before parts wrote them."""

import hashlib
import json
import shutil

import numpy as np

from dynaip_jax.data import features
from dynaip_jax.data.features import Store, moments_name
from dynaip_jax.data.order import make_order
from dynaip_jax.data.records import open_dataset

VARIANTS = 2


def write_cache(path, settings, batch=4, *, dtype="float32", variants=VARIANTS):
    """A cache of random features for batches of `batch` of the dataset of `settings`, in the new folder `path`; returns its facts."""
    dataset, rng = open_dataset(settings.path), np.random.default_rng(0)
    order = make_order(settings, dataset, batch)
    facts = features.facts(settings, order, "encoders", dtype, dataset.content)
    key = features.cache_key(facts, variants, features.ROWS_A_PART)
    for number in range(features.parts(len(dataset))):
        folder = path / features.part_name(number)
        folder.mkdir(parents=True)
        bucket_of = order.bucket_of[number * features.ROWS_A_PART :][: features.ROWS_A_PART]
        store, places = Store(folder, dtype), np.arange(len(bucket_of))
        for name, shape in (("states", (8, 6)), ("pooled", (5,))):
            store.put(f"empty_{name}", shape, (), rng.normal(size=shape))
            store.put(name, (len(places), *shape), (places,), rng.normal(size=(len(places), *shape)))
        for variant in range(variants):
            levels = rng.normal(size=(len(places), 3, 7, 6))
            store.put("levels", (variants, *levels.shape), (variant, places), levels)
            for index, bucket in enumerate(order.buckets):
                if members := int(np.count_nonzero(bucket_of == index)):
                    moments = rng.normal(size=(members, bucket.height // 8, bucket.width // 8, 4))
                    where = (variant, np.arange(members))
                    store.put(moments_name(bucket), (variants, *moments.shape), where, moments)
        store.finish()
        features.write_part(folder, key, number, bucket_of)
    features.write_facts(path, facts, variants)
    return facts


def as_before_parts(path):
    """Makes of a cache of one part what versions of before parts wrote."""
    stated, part = json.loads((path / features.FILE).read_text()), path / features.part_name(0)
    (part / features.PART).unlink()
    for file in part.iterdir():
        file.rename(path / file.name)
    shutil.rmtree(part)
    arrays = sorted(file.name.removesuffix(features.CHECKS) for file in path.glob(f"*{features.CHECKS}"))
    content = {k: stated[k] for k in ("format", "variants", "facts")} | dict(format_version=1, arrays=arrays)
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / features.FILE).write_text(json.dumps(content | dict(checksum=checksum), indent=2) + "\n")
