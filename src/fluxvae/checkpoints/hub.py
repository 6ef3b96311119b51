"""Gets the VAE's files of a hub id, from the hub's cache or from the hub itself, within a bounded time.

Where there is no network, the hub's own library keeps trying for most of a minute. Here the hub is asked only once,
for the list of files in the repository, and has `_PATIENCE_S` seconds to answer (or HF_HUB_ETAG_TIMEOUT, where that is
set). Without an answer the cached files are used, if they are complete.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxvae.checkpoints.folders import STANDARD_NAME, choose_weights, read_index
from fluxvae.checkpoints.local import CLASSES, check_config, look_in_folder
from fluxvae.errors import CheckpointError, first_line

__all__ = ["cached_snapshot", "snapshot"]

_PATIENCE_S = 3.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


def snapshot(source: str, *, subfolder: str | None, revision: str | None, variant: str | None) -> Path:
    """Return the folder in the hub's cache that holds the VAE of a repository, after downloading what was missing.

    Args:
        source: the hub id, ``"owner/name"``.
        subfolder, revision, variant: as for `open_checkpoint`.

    Raises:
        CheckpointError: the repository or the revision does not exist, holds no VAE, or may not be read with this
            login; or the hub cannot be reached and the cache does not hold everything.
    """
    from huggingface_hub import constants

    where = f"{source}@{revision}" if revision else source
    repository = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    if constants.HF_HUB_OFFLINE:
        return _from_cache(repository, where, subfolder, revision, variant, "HF_HUB_OFFLINE is set")
    if revision is not None and _COMMIT.fullmatch(revision):
        try:  # a commit never changes, so the cached files are the hub's and the hub need not be asked
            return _from_cache(repository, where, subfolder, revision, variant, "")
        except CheckpointError:
            pass
    try:
        names = _listing(source, revision)
    except Exception as error:
        _refuse(where, error)
        return _from_cache(repository, where, subfolder, revision, variant, first_line(error), error)
    try:
        return _download(source, where, names, subfolder, revision, variant)
    except CheckpointError:
        raise
    except Exception as error:
        _refuse(where, error)
        raise CheckpointError(
            f"checkpoint: {where} cannot be downloaded: {first_line(error)}; check the connection, or pass a local "
            "folder or file"
        ) from error


def cached_snapshot(repository: Path, revision: str | None) -> Path:
    """Return the snapshot of a revision in the folder that the hub's cache has for a repository.

    Args:
        repository: that folder, named ``models--owner--name``.
        revision: a branch, tag or commit. None means main; where the cache does not say which commit main is, the only
            snapshot.

    Raises:
        CheckpointError: the revision is not cached, or there are several snapshots and nothing says which is meant.
    """
    snapshots = repository / "snapshots"
    reference = repository / "refs" / (revision or "main")
    if reference.is_file():
        folder = snapshots / reference.read_text(encoding="utf-8").strip()
    elif revision is not None:
        folder = snapshots / revision
    else:
        found = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
        if len(found) > 1:
            raise CheckpointError(
                f"checkpoint: {repository} holds the snapshots {', '.join(path.name for path in found)} and no "
                "refs/main that says which is meant; pass the path of one of them, or revision="
            )
        folder = found[0] if found else snapshots / "main"
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint: {repository} holds no snapshot of {revision or 'main'}; download it again")
    return folder


def _from_cache(
    repository: Path,
    where: str,
    subfolder: str | None,
    revision: str | None,
    variant: str | None,
    reason: str,
    cause: Exception | None = None,
) -> Path:
    """Return the VAE's folder from the cache alone; ``reason`` says in the error why the hub was not asked."""
    unreachable = (
        f"checkpoint: {where} is not in the hub's cache{{what}} and the hub cannot be reached ({reason}); check the "
        "connection, or pass a local folder or file"
    )
    try:
        folder = cached_snapshot(repository, revision)
    except CheckpointError as error:
        raise CheckpointError(unreachable.format(what="")) from (cause or error)
    try:
        return look_in_folder(folder, subfolder, variant).files[0].parent
    except CheckpointError as error:
        what = " as a whole (" + str(error).removeprefix("checkpoint: ").split("; ")[0] + ")"
        raise CheckpointError(unreachable.replace("{what}", what.replace("{", "(").replace("}", ")"))) from error


def _listing(source: str, revision: str | None) -> set[str]:
    """Return the names of the files in the repository.

    The hub is asked in a thread of its own, because looking up the hub's address may hang, and no timeout of the HTTP
    request covers that.

    Raises:
        TimeoutError: there was no answer within `_PATIENCE_S` (or HF_HUB_ETAG_TIMEOUT) seconds.
        Exception: whatever the hub's library raised.
    """
    from huggingface_hub import HfApi, constants

    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else _PATIENCE_S
    answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put((HfApi().model_info(source, revision=revision, timeout=seconds), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=ask, daemon=True, name="fluxvae-hub").start()
    try:
        info, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(
            f"{constants.ENDPOINT} gave no answer within {seconds:g} seconds; HF_HUB_ETAG_TIMEOUT allows more"
        ) from None
    if error is not None:
        raise error
    return {sibling.rfilename for sibling in info.siblings or ()}


def _download(
    source: str, where: str, names: set[str], subfolder: str | None, revision: str | None, variant: str | None
) -> Path:
    """Download the config and the weights, unless they are cached, and return the folder that holds them.

    All weights are fetched at the commit that the config came from, so that a push in between cannot mix two revisions.
    """
    from huggingface_hub import hf_hub_download

    def fetch(name: str, of: str | None) -> Path:
        return Path(hf_hub_download(source, name, subfolder=folder or None, revision=of))

    places = [subfolder.strip("/")] if subfolder is not None else ["", "vae"]
    candidates = [folder for folder in places if _in(folder, "config.json") in names]
    for folder in candidates:
        config = fetch("config.json", revision)
        if folder != candidates[-1] and not _is_vae(config):
            continue
        check_config(config)
        inside = {name.removeprefix(_in(folder, "")) for name in names if name.startswith(_in(folder, ""))}
        chosen = choose_weights(inside, variant, where)
        if chosen is None:
            break
        commit = config.parent.name if not folder else config.parents[len(Path(folder).parts)].name
        listed = [] if chosen.index is None else read_index(fetch(chosen.index, commit))
        for name in listed or chosen.shards:
            fetch(name, commit)
        return config.parent
    files = sorted(name for name in names if "/" not in name and name.endswith((".safetensors", ".sft")))
    single = f"; it has {', '.join(files[:5])}: download the VAE's file and pass its path" if files else ""
    looked = " or in ".join(f"its {folder}/" if folder else "it" for folder in places)
    raise CheckpointError(
        f"checkpoint: {where} holds no VAE: no config.json with {STANDARD_NAME} in {looked}; name the folder that has "
        f"one with subfolder={single}"
    )


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_vae(config: Path) -> bool:
    try:
        return check_config(config)["_class_name"] in CLASSES
    except CheckpointError:
        return False


def _refuse(where: str, error: Exception) -> None:
    """Raise a `CheckpointError` for an answer that is final, such as that there is no such repository.

    Return for any other error, such as a lost connection: then the cached files may still do.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    messages: list[tuple[type[Exception], Callable[[], str]]] = [
        (GatedRepoError, lambda: "is gated; accept its licence on its page and log in with `hf auth login`"),
        (
            RepositoryNotFoundError,
            lambda: "is no repository of the hub, or it is private; check the name, or log in with `hf auth login`",
        ),
        (RevisionNotFoundError, lambda: "has no such revision; expected a branch, tag or commit of the repository"),
        (HFValidationError, lambda: f"is no hub id: {first_line(error)}; expected owner/name"),
    ]
    for kind, message in messages:
        if isinstance(error, kind):
            raise CheckpointError(f"checkpoint: {where} {message()}") from error
