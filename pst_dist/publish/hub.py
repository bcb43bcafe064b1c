"""Uploads an export, and its GGUF files if wanted, to a model repository of the Hugging Face hub.

`plan` only says what would be uploaded and where; `push` uploads it as one commit. A new
repository is private unless the caller says otherwise. The token comes from HF_TOKEN alone and never reaches the disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pst_dist.errors import ConfigError, EnvironmentFault, InputError, PstError, first_line
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import MANIFEST

log = logging.getLogger(__name__)
TOKEN = "HF_TOKEN"


@dataclass(frozen=True)
class PushPlan:
    """What goes into which repository."""

    repo: str
    private: bool
    files: dict[str, Path]
    """Path in the repository -> file here."""
    licence: str
    base_model: str
    datasets: str
    message: str
    """The commit's message, with the digest of the export."""

    @property
    def bytes(self) -> int:
        """Total size."""
        return sum(path.stat().st_size for path in self.files.values())

    def lines(self) -> list[str]:
        """The plan as text."""
        shown = [f"  {name}  {path.stat().st_size / 2**20:.1f} MiB" for name, path in self.files.items()]
        return [
            f"{self.repo} ({'private' if self.private else 'PUBLIC'}): {len(self.files)} files, "
            f"{self.bytes / 2**20:.1f} MiB",
            *shown,
            f"  licence {self.licence}; base model: {self.base_model}; data sets: {self.datasets}",
        ]


def plan(export: Path, repo: str, *, private: bool = True, gguf: Sequence[Path] = ()) -> PushPlan:
    """The files of a finished export and of GGUF folders; each is first compared with its digest.

    Raises ConfigError for a name that is not NAME/REPO, InputError when something is missing or the card names no
    licence, and IntegrityError for damage.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"--push-to-hub {repo!r} is not a repository: {first_line(error)}", "give NAME/REPO"
        ) from error
    if repo.count("/") != 1:
        raise ConfigError(f"--push-to-hub {repo!r} names no owner", "give NAME/REPO")
    manifest = Artefact(export, "export").verified()
    if manifest is None:
        raise InputError("no finished export here", "run `pst export` first", path=export)
    card = ModelCard.load(export / "README.md").data
    if not card.license:
        raise InputError(
            "the card names no licence",
            "run `pst export --license ID` with one that the base model, the rows and the teacher allow",
            path=export / "README.md",
        )
    files = {name: export / name for name in [*sorted(manifest.files), MANIFEST]}
    for folder in gguf:
        listed = Artefact(folder, "gguf").verified()
        if listed is None:
            raise InputError("no finished GGUF file here", "run `pst export --gguf` first", path=folder)
        files |= {f"gguf/{folder.name}/{name}": folder / name for name in [*sorted(listed.files), MANIFEST]}
    return PushPlan(
        repo=repo,
        private=private,
        files=files,
        licence=str(card.license),
        base_model=str(card.base_model or "none named"),
        datasets=", ".join(card.datasets or []) or "none named",
        message=f"pst-dist export {manifest.digest[:12]}",
    )


def push(planned: PushPlan) -> str:
    """Create the repository if it does not exist, upload everything as one commit and return the commit's URL.

    A transfer that is cut is repeated by huggingface_hub; after a failure the same command sends only what the hub does
    not have. Raises EnvironmentFault without HF_TOKEN, without a network or when the hub refuses, and InputError
    for a public repository where a private one was meant.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    token = os.environ.get(TOKEN)
    if not token:
        raise EnvironmentFault(f"{TOKEN} is not set", "export a token with write access; it is not stored anywhere")
    api = HfApi(token=token)
    try:
        try:
            private_there = api.model_info(planned.repo).private
        except RepositoryNotFoundError:
            api.create_repo(planned.repo, private=planned.private)
            private_there = planned.private
        if planned.private and not private_there:
            raise InputError(f"{planned.repo} exists and is public", "add --public, or name another repository")
        log.info("uploading %.1f MiB to %s", planned.bytes / 2**20, planned.repo)
        operations = [CommitOperationAdd(name, str(path)) for name, path in planned.files.items()]
        return str(api.create_commit(planned.repo, operations, commit_message=planned.message).commit_url)
    except PstError:
        raise
    except Exception as error:  # httpx, hub and OS errors all have the same remedies
        reason = first_line(error, 200).replace(token, "***")
        raise EnvironmentFault(
            f"the hub refused {planned.repo}: {reason}",
            f"check the network, {TOKEN}'s write access and the name, then run the same command again",
        ) from None
