"""Models of the Hugging Face hub: hf://owner/name[@revision][/file], downloaded to its cache; an interrupted download goes on."""

from __future__ import annotations

import re
from pathlib import Path

from dynaip_jax.errors import UserError, reason

ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./ -]+))?")
WANTED = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
)  # of a component; other formats of the same weights are left there


def local(path: Path, field: str) -> Path:
    """`path`, or where what it names on the hub lies here, once it is downloaded. Raises `UserError`, which names the option
    `field`, if that fails."""
    if path.parts[:1] != ("hf:",):
        return path
    address = ADDRESS.fullmatch(str(path))
    if address is None:
        raise UserError(
            f"`{field}` {path}: expected hf://owner/name, hf://owner/name@revision or one of these and /file; correct it"
        )
    repo, revision, file = address["repo"], address["revision"], address["file"]
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        try:
            huggingface_hub.hf_hub_download(repo, "model_index.json", revision=revision)
            wanted = ["model_index.json", *(f"*/{pattern}" for pattern in WANTED)]
        except errors.EntryNotFoundError:
            wanted = list(WANTED)
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as e:  # of the hub, of the network below it, of the disk
        if isinstance(e, errors.GatedRepoError):
            why, remedy = "is gated", "accept its licence on its page, then log in: hf auth login"
        elif isinstance(e, errors.RevisionNotFoundError):
            why, remedy = f"has no revision {revision}", "check the name"
        elif isinstance(e, errors.RepositoryNotFoundError):
            why, remedy = "is not there, or is private", "check the name, or log in: hf auth login"
        else:
            why, remedy = (
                f"cannot be downloaded ({reason(e, 90)})",
                "check the network, or download it elsewhere and pass the folder",
            )
        raise UserError(f"`{field}` hf://{repo}: {why}; expected a model on the hub; {remedy}") from e
