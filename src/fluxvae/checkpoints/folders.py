"""Chooses the weights of a diffusers folder by the names of its files, which tell variants, shards and indices.

Names are all it takes, so that the same rules serve a folder on disk and the listing of a repository on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from fluxvae.errors import CheckpointError

__all__ = ["INDEX", "STANDARD_NAME", "WEIGHTS", "Choice", "choose_weights", "read_index", "read_json"]

STANDARD_NAME = "diffusion_pytorch_model.safetensors"
# diffusers and transformers put a variant before or after the shard's number, and before or after ".index".
WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.(?P<before>\w+))?(?:-(?P<number>\d+)-of-(?P<count>\d+))?(?:\.(?P<after>\w+))?"
    r"\.(?P<kind>safetensors|bin)"
)
INDEX = re.compile(
    r"diffusion_pytorch_model(?:\.(?P<before>\w+))?\.(?P<kind>safetensors|bin)\.index(?:\.(?P<after>\w+))?\.json"
)


@dataclass
class Choice:
    """The names of the files that hold one variant of the weights, in one format."""

    variant: str | None
    index: str | None = None
    """The index that lists the shards, where there is one."""
    single: str | None = None
    """The one file that holds all the weights, where they are not split into shards."""
    parts: dict[int, str] = field(default_factory=dict)
    """The shards that are there, by their number, which counts from 1."""
    count: int = 0
    """How many shards there should be, as their names say ("-of-00003")."""

    @property
    def shards(self) -> list[str]:
        """The names of all files with weights, for a folder without an index; shards that are missing are included."""
        if self.single is not None:
            return [self.single]
        known = next(iter(self.parts.values()))
        number = re.compile(r"-\d+-of-")
        width = len(re.search(r"-(\d+)-of-", known)[1])  # type: ignore[index]
        return [number.sub(f"-{part:0{width}}-of-", known) for part in range(1, self.count + 1)]


def choose_weights(
    names: Collection[str], variant: str | None, where: str, *, only: str | None = None, exact: bool = False
) -> Choice | None:
    """Choose the weights of a diffusers folder by the names of its files. Safetensors are preferred to ``.bin`` files.

    Args:
        names: the names of all files in the folder.
        variant: which variant is wanted. None means the weights without a variant; where the folder has none such,
            its only variant.
        where: the folder or repository, for messages.
        only: ``"safetensors"`` or ``"bin"``, where only one format will do.
        exact: a variant of None means the weights without a variant and nothing else. This is so where the caller
            named one file of the folder, and that file has no variant.

    Returns:
        None where there are no weights at all.

    Raises:
        CheckpointError: the folder does not have the variant, or it has several and the caller named none.
    """
    found: dict[tuple[str | None, str], Choice] = {}
    for name in names:
        match = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
        if match is None or (only is not None and match["kind"] != only):
            continue
        its = match["before"] or match["after"]
        choice = found.setdefault((its, match["kind"]), Choice(its))
        if match.re is INDEX:
            choice.index = name
        elif match["number"] is None:
            choice.single = name
        elif int(match["count"]) <= 10_000:
            choice.parts[int(match["number"])] = name
            choice.count = int(match["count"])
    found = {key: one for key, one in found.items() if one.index or one.single or one.parts}
    variants = sorted({its for its, _ in found if its is not None})
    if not found:
        return None
    if variant is None and not exact and not any(its is None for its, _ in found):
        if len(variants) > 1:
            raise CheckpointError(
                f"checkpoint: {where} holds the variants {', '.join(variants)} and no weights without one; say which: "
                f"variant={variants[0]!r}, for example"
            )
        variant = variants[0]
    for kind in ("safetensors", "bin"):
        if (variant, kind) in found:
            return found[variant, kind]
    have = ", ".join(variants) or "none"
    raise CheckpointError(
        f"checkpoint: {where} has no weights of the variant {variant!r}; it has the variants: {have}"
        + ("; leave variant out for the weights without one" if any(its is None for its, _ in found) else "")
    )


def read_index(path: Path) -> list[str]:
    """Return the names of the shards that an index lists. They lie in the same folder as the index.

    Raises:
        CheckpointError: the file is not an index, or it lists files that lie elsewhere.
    """
    content = read_json(path)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"checkpoint: {path} has no weight_map that lists shards; download it again")
    shards = sorted(set(places.values()))
    if foreign := [name for name in shards if Path(name).name != name]:
        raise CheckpointError(
            f"checkpoint: {path} lists {foreign[0]!r}; expected names of files beside it, without folders"
        )
    return shards


def read_json(path: Path) -> object:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: the file cannot be read, or is not JSON.
    """
    parse: Callable[[str], object] = json.loads
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path} is not readable as JSON: {error}; download it again") from error
