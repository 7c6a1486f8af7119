"""Models of the Hugging Face hub, fetched by huggingface_hub: its token, its cache, its mirrors.

`hf:ORG/NAME` is the main branch as it was when it was first fetched here; its revision is kept in
this project's cache and taken from then on. `hf:ORG/NAME@REVISION` names one.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from proteus_jax.errors import InputError, Unreachable
from proteus_jax.runtime.console import waiting
from proteus_jax.runtime.download import cache_folder, expect_digest, is_offline
from proteus_jax.runtime.filesystem import cache_directory, sha256, write_atomically
from proteus_jax.weights.convert.hf_directory import DESCRIPTIONS, wanted_files

PREFIX = "hf:"
_ADDRESS = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class Repository(NamedTuple):
    """A repository, and the revision that is asked for; an empty one is the main branch."""

    name: str
    revision: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def parse(address: str) -> Repository:
    """InputError where an address is not of the form hf:ORG/NAME or hf:ORG/NAME@REVISION."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"{address}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return Repository(match["name"], match["revision"] or "")


def fetch(repository: Repository) -> tuple[Path, dict[str, Any]]:
    """A folder with the model's files, in the hub's own cache, and where they are from.

    InputError, one of them Unreachable, says what to do: a gated model's terms, a missing token, no
    network. Digests are recorded at the first time, and checked from then on.
    """
    pinned = _pinned().get(str(repository), repository.revision)
    folder = _snapshot(repository, pinned)
    revision = folder.name
    names = wanted_files(path.name for path in folder.iterdir())
    for name in names:
        expect_digest(f"{PREFIX}{repository.name}@{revision}/{name}", sha256(folder / name))
    _pin(repository, revision)
    return folder, {"repository": repository.name, "revision": revision}


def _revisions() -> Path:
    return cache_directory() / "downloads" / "revisions.json"


def _pinned() -> dict[str, str]:
    return json.loads(_revisions().read_text()) if _revisions().is_file() else {}


def _pin(repository: Repository, revision: str) -> None:
    if _pinned().get(str(repository)) == revision:
        return
    cache_folder("downloads")
    text = json.dumps(_pinned() | {str(repository): revision}, indent=2)
    write_atomically(_revisions(), text + "\n")


def _snapshot(repository: Repository, revision: str) -> Path:
    """The folder of a revision; of the main branch where none is given."""
    # Here: it reads its environment when it is imported, and most runs do without it.
    import huggingface_hub
    from huggingface_hub import errors, utils

    endpoint = os.environ.get("HF_ENDPOINT") or None
    name, wanted = repository.name, revision or None
    utils.disable_progress_bars()
    try:
        if is_offline():
            return _in_cache(repository, wanted)
        print(f"fetching {repository} from the Hugging Face hub", flush=True)
        with waiting(f"fetching {repository}"):
            client = huggingface_hub.HfApi(endpoint=endpoint)
            there = client.model_info(name, revision=wanted, timeout=30.0)
            files = wanted_files(each.rfilename for each in there.siblings or ())
            if not files:
                raise InputError(
                    f"{repository}: it holds no weights that are read here (model.safetensors, "
                    "pytorch_model.bin or their like)"
                )
            folder = huggingface_hub.snapshot_download(
                name, revision=there.sha, allow_patterns=files, endpoint=endpoint
            )
        return Path(folder)
    except errors.GatedRepoError:
        raise InputError(
            f"{repository}: gated: accept its terms at https://huggingface.co/{name}, then give a "
            "token of that account: `hf auth login`, or the variable HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repository}: there is no such repository, or it is private and no token of its "
            "owner is here (`hf auth login`, or the variable HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{repository}: it has no revision {revision}; the revisions that were first fetched "
            f"are kept in {_revisions()}"
        ) from None
    except (InputError, KeyboardInterrupt):
        raise
    # Its transport is another library, or a third, in each of its versions.
    except Exception as error:
        with contextlib.suppress(Unreachable):
            return _in_cache(repository, wanted)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise Unreachable(f"{repository}: cannot be fetched ({reason})") from None


def _in_cache(repository: Repository, revision: str | None) -> Path:
    """The folder that the hub's own cache has; Unreachable where there is none with weights."""
    import huggingface_hub

    for name in DESCRIPTIONS:
        cached = huggingface_hub.try_to_load_from_cache(repository.name, name, revision=revision)
        if isinstance(cached, str) and wanted_files(
            each.name for each in Path(cached).parent.iterdir()
        ):
            return Path(cached).parent
    raise Unreachable(
        f"{repository}: not here, and nothing is fetched offline (--offline, HF_HUB_OFFLINE): on a "
        f"machine with a network: hf download {repository.name}"
    )
