"""The choices that options, configs and commands share by name. Imports nothing, so that every room may read it."""

KERNELS = ("auto", "xla", "per_head", "splash", "cudnn")  # of attention
REMATS = ("none", "dots", "full")  # what the backward pass computes again
WEIGHTS = ("full", "int8", "fp8")  # precision of the transformer's blocks
DTYPES = ("float32", "bfloat16")
QUERIES = ("before_rope", "after_rope")  # of the reference term
MERGES = ("sum", "concat")  # of several subjects, in the reference term
SITES = ("before_projection", "residual")  # where a block adds the reference term
REGIONS = ("auto", "none")
FITS = ("pad", "crop", "stretch")  # how a reference becomes square


def check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises `ValueError`, naming the field, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(allowed)}")
