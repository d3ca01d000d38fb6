"""
What makes a saved folder a repository of its own: beside the weights lies the code that reads them, and `config.json`
says so. It then loads with `trust_remote_code=True` where this package is not installed.
"""

import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedConfig

from .card import make_model_card

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class TransfusionHubMixin:
    """`push_to_hub` that keeps the repository's model card, or writes that of [`make_model_card`]."""

    def _save_card(self, folder: str | os.PathLike, model_name: str) -> None:
        """Where there is none, and of whatever has a configuration."""
        config = getattr(getattr(self, "model", self), "config", self)
        file = Path(folder, "README.md")
        if isinstance(config, PreTrainedConfig) and not file.exists():
            make_model_card(config, model_name).save(file)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """
        Uploads what `save_pretrained` writes, in one commit, into a repository that is made if there is none. New
        weights take the place of the old, in however many files those are.

        Args:
            repo_id (`str`): `"name"`, or `"organization/name"`.
            commit_message (`str`, *optional*), commit_description (`str`, *optional*)
            private (`bool`, *optional*): Of a repository that is new.
            token (`bool` or `str`, *optional*)
            revision (`str`, *optional*): The branch; made if there is none.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request in place of a commit.
            max_shard_size (`int` or `str`, defaults to `"50GB"`): Of the files of weights.
            tags (`list[str]`, *optional*): Added to those of the model card.

        Returns:
            `huggingface_hub.CommitInfo`
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            card_file = Path(folder, "README.md")
            try:
                shutil.copyfile(api.hf_hub_download(repo_id, card_file.name, revision=revision), card_file)
            except (EntryNotFoundError, RevisionNotFoundError):
                self._save_card(folder, repo_id)
            self.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[attr-defined]
            if tags and card_file.exists():
                card = ModelCard.load(card_file)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
                card.save(card_file)
            # Not `upload_folder`, which cuts large folders into several commits: no one shall find half of a model.
            files = {f.relative_to(folder).as_posix(): f for f in sorted(Path(folder).rglob("*")) if f.is_file()}
            operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
            if any(_WEIGHTS.fullmatch(name) for name in files):
                # One file would be taken in place of new shards, and of old shards nothing would ever be read.
                there = api.list_repo_files(repo_id, revision=revision)
                old = [name for name in there if _WEIGHTS.fullmatch(name) and name not in files]
                operations += [CommitOperationDelete(name) for name in old]
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


__all__ = ["TransfusionHubMixin"]
