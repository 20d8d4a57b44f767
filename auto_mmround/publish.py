"""Checkpoints to the Hub through huggingface_hub: a private repository with a model card."""

import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError

from auto_mmround.errors import UserError
from auto_mmround.report import card, report
from auto_mmround.untrusted import one_line

# These name folders of this machine; the card says the same without them.
OURS_ALONE = ("report.html", "report.json", "eval.json")
REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """Where to push. public: else a repository that everybody reads is refused. endpoint: None is
    the Hub itself."""

    repo: str
    public: bool = False
    endpoint: str | None = None

    def check(self) -> str:
        """The user's token. Raises UserError for a wrong name, and where there is no token."""
        if not REPO.fullmatch(self.repo):
            raise UserError(f"push: {self.repo!r} is no repository: write USER/NAME")
        token = huggingface_hub.get_token()
        if token is None:
            raise UserError("push: no token for the Hub on this machine: run `hf auth login` once")
        return token


def push(folder: Path, place: Place) -> str:
    """Write the model card and send the folder; returns the address of what was sent.

    Raises UserError for a folder that is no result of ours, for a repository that is public without
    ``public``, and where the Hub refuses or can't be reached.
    """
    token = place.check()
    if not report.ours(folder):
        raise UserError(f"push: {folder} is not the result of one of our runs")
    card.write(folder)
    api = huggingface_hub.HfApi(endpoint=place.endpoint, token=token)
    again = f"auto-round-mllm push {folder} {place.repo}"
    try:
        api.create_repo(place.repo, private=not place.public, exist_ok=True)
        if not place.public and not api.model_info(place.repo).private:
            raise UserError(f"push: {place.repo} exists and is public: add --public to send there")
        sent = api.upload_folder(
            repo_id=place.repo, folder_path=folder, ignore_patterns=list(OURS_ALONE),
            commit_message=f"{folder.name} (auto_mmround)",
        )  # fmt: skip
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        reason = one_line(str(error))[:300] or type(error).__name__
        raise UserError(f"push: {place.repo}: {reason}; the folder is kept: {again}") from None
    return str(sent.commit_url)


def repositories(folders: list[Path], place: Place) -> dict[Path, Place]:
    """A repository for each folder of a run: the name itself, or one a format."""
    if len(folders) == 1:
        return {folders[0]: place}
    ends = {folder: folder.name.rpartition("-w")[2].partition("-")[2] for folder in folders}
    return {
        folder: Place(f"{place.repo}-{end}", place.public, place.endpoint)
        for folder, end in ends.items()
    }
