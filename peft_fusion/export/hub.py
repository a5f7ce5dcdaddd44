"""Exported models on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

MESSAGE = "Upload a model exported by peft-fusion"


def check_upload(repo_id: str, token: str | bool | None) -> None:
    """Refuses what could not be uploaded, before there is anything to upload.

    Args:
        repo_id: "owner/name", or a name of one's own.
        token: see `HfApi`.

    Raises:
        ValueError: if it is no id, or there is no network.
        OSError: if the Hub does not know who one is.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`push_to_hub={repo_id!r}` is no id of a repository, such as `me/small`: {error}") from error
    if constants.is_offline_mode():
        raise ValueError(
            "`push_to_hub` needs the Hub, but HF_HUB_OFFLINE is set. Unset it, or leave `push_to_hub` out."
        )
    HfApi().whoami(token=token)


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, message: str | None) -> str:
    """Uploads a folder as a model, which is made if it is not there.

    Args:
        folder: what to upload.
        repo_id: where to.
        private: whether a new repository is.
        token: see `HfApi`.
        message: of the commit; None: one that names this package.

    Returns:
        The id that it has on the Hub.
    """
    api = HfApi(token=token)
    found: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=found, folder_path=folder, commit_message=message or MESSAGE)
    return found
