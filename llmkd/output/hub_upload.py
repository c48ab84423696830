"""Uploads a finished student to the hub. An upload that cannot work is refused before the run, and a failed upload never costs the run."""

import shlex
from pathlib import Path

from .. import __version__
from ..config.recipe import PushToHub
from ..console import info
from ..errors import UserError
from ..files import write_sealed
from .run_folder import RunFolder


def check(settings: PushToHub | None) -> None:
    """Checks that need no network. UserError names everything that is missing."""
    if settings is None:
        return
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    problems = []
    try:
        validate_repo_id(settings.repo)
    except HFValidationError:
        allowed = "letters, digits, '-', '_' and '.', with neither '--' nor '..' in it nor '.git' at its end"
        problems.append(f"push_to_hub.repo: found {settings.repo!r}, expected name or owner/name of {allowed}")
    if is_offline_mode():
        problems.append("push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave push_to_hub out for now")
    elif not get_token():
        problems.append(
            "push_to_hub: there is no token for the hub; log in with hf auth login or set HF_TOKEN, or leave push_to_hub out for now"
        )
    if problems:
        raise UserError(*problems)


def publish(settings: PushToHub | None, folder: RunFolder) -> dict:
    """Upload a finished run's student, unless summary.json records that upload already. Returns the summary, with the upload recorded."""
    summary = folder.summary()
    if settings and summary.get("pushed") != settings.repo:
        info(f"uploaded to {upload(settings, folder.path / summary['output'])}")
        summary["pushed"] = settings.repo
        write_sealed(folder.path / "summary.json", summary)
    return summary


def upload(settings: PushToHub, student: Path) -> str:
    """Create the repository if needed, and upload the folder as one commit. Returns the repository's address. UserError if that fails."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="llmkd", library_version=__version__)
    try:
        repo = api.create_repo(settings.repo, private=settings.private, exist_ok=True)
        if settings.private and not api.model_info(repo.repo_id).private:
            raise UserError("it is public, but push_to_hub.private is true; set it to false, or choose another repository")
        api.upload_folder(repo_id=repo.repo_id, folder_path=student, commit_message=f"Trained with llmkd {__version__}")
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason[:300]}"
        command = f"hf upload {'--private ' if settings.private else ''}{shlex.quote(settings.repo)} {shlex.quote(str(student))} ."
        raise UserError(
            f"push_to_hub: {settings.repo} could not be uploaded to ({reason}); the finished student is in {student}: "
            f"--resume tries again, and so does {command}"
        ) from error
    return str(repo)
