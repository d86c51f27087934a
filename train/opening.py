"""What a run says of itself before its first step: data, buckets, what is left out or changed, and how long it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from dynaip_jax.data.mixture import Mixture
from train.run import Run

LOOKED_AT = 64  # captions, evenly over the dataset


def opening(run: Run, start: int) -> str:
    """Lines that begin with "data: " and "run: ", and indented ones below them. `start`: steps that are done."""
    return "\n".join([*_data(run), *_run(run, start)])


def _data(run: Run) -> Iterator[str]:
    order, dataset, config = run.data.order, run.dataset, run.config
    each = order.steps_per_epoch * config.batch
    rows = sum(map(order.count_in, range(len(order.buckets))))
    content = f"content {dataset.content[:12]}" if dataset.content else "no digest: prepared by an older version"
    yield f"data: {len(dataset):,} rows of {dataset.path} ({content}); an epoch is {order.steps_per_epoch:,} steps of {config.batch}"
    if config.data.features:
        yield f"  features: {config.data.features}; {run.data.reader.variants} variants, taken in turn by epochs"
    parts = dataset.datasets if isinstance(dataset, Mixture) else ()
    for part, weight in zip(parts, config.data.weights or (1.0,) * len(parts), strict=True):
        yield f"  {part.path}: {len(part):,} rows, each {weight:g} times an epoch"
    for number, bucket in enumerate(order.buckets):
        members = order.rows_in(number)
        line = f"  bucket {bucket.name}, {bucket.width} x {bucket.height} pixels: {len(members):,} rows"
        times = (np.array([[bucket.height, bucket.width]]) / dataset.sizes[members]).max(axis=1)
        if (small := int(np.count_nonzero(times > 1))) > 0:
            line += f", of which {small:,} are smaller and enlarged up to {times.max():.1f} times"
        yield line
    if rows > each:
        yield f"  left out of each epoch: {rows - each:,} rows ({(rows - each) / rows:.1%}), other ones every time: they fill no batch of their bucket"
    if line := _cut_captions(run):
        yield line


def _cut_captions(run: Run) -> str:
    """What is to be said of captions that are longer than the text encoders take."""
    dataset = run.dataset
    looked_at = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int))
    cut = Counter(encoder for row in looked_at for encoder in run.tokenizers.cut(dataset[int(row)].caption))
    if not cut:
        return ""
    longer = ", ".join(f"{count} are longer than {encoder} takes" for encoder, count in cut.items())
    return f"  captions: of {len(looked_at)} looked at, {longer}; what does not fit is cut off"


def _run(run: Run, start: int) -> Iterator[str]:
    config, order = run.config, run.data.order
    epochs = (config.steps - start) / order.steps_per_epoch
    fixed = ", all of the first batch" if config.fixed_batch else f", {epochs:.3g} epochs"
    yield f"run: steps {start + 1:,} to {config.steps:,}{fixed}; a checkpoint every {config.save_every:,}, {config.keep} kept and the best"
    if config.init_adapter and not start:
        assert run.first_adapter is not None
        yield f"  starts from the adapter {config.init_adapter} (step {run.first_adapter['training_step']} of its training)"
    decay, names = config.optim.weight_decay, run.constants.decayed
    trained = {"adapter": ("adapter",), "base": ("transformer",), "all": ("adapter", "transformer")}[config.trainable]
    count = sum(name.partition(".")[0] in trained for name in names)
    yield f"  weight decay {decay:g}" + (
        f": {count} matrices, marked above; no scales, biases and tables" if decay else ""
    )
