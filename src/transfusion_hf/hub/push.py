"""Uploading a model to the Hub."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel, ProcessorMixin

from .card import evaluation_results, make_model_card

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def push_to_hub(
    model: PreTrainedModel,
    processor: ProcessorMixin | None = None,
    *,
    repo_id: str,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    results: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """
    Uploads a model, its code and its processor in one commit. Creates the repository if it does not exist, keeps its
    model card or writes that of [`make_model_card`], and deletes the weight files that the new ones replace.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`), processor (`TransfusionProcessor`, *optional*)
        repo_id (`str`): `"name"`, or `"organization/name"`; `private` applies to a new repository.
        revision (`str`, *optional*): The branch; created if it does not exist.
        max_shard_size (`int` or `str`, defaults to `"50GB"`): The size above which weights are split into files.
        tags (`list[str]`, *optional*): Added to the tags of the model card.
        results (`dict[str, Any]`, *optional*):
            Of `transfusion_hf.evaluation.evaluate`, for the card's metadata: the `model-index` that the Hub shows.
        kwargs: For `HfApi.create_commit`: `commit_message`, `commit_description`, `create_pr` …
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        try:
            card_file = api.hf_hub_download(repo_id, "README.md", revision=revision)
            card = ModelCard.load(card_file, ignore_metadata_errors=True)
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            card = make_model_card(model.config, repo_id, results=results)
        if tags:
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        if results:
            new = evaluation_results(results)
            named = {(entry.unique_identifier, entry.metric_type) for entry in new}
            old = card.data.eval_results or []
            card.data.eval_results = [e for e in old if (e.unique_identifier, e.metric_type) not in named] + new
            card.data.model_name = card.data.model_name or repo_id
        card.save(Path(folder, "README.md"))
        # Not `upload_folder`: it splits large folders into several commits, and a reader could find half a model.
        files = {file.relative_to(folder).as_posix(): file for file in Path(folder).rglob("*") if file.is_file()}
        operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
        # A single old file would be loaded instead of new shards, and old shards would be downloaded for nothing.
        stale = set(api.list_repo_files(repo_id, revision=revision)) - files.keys()
        operations += [CommitOperationDelete(name) for name in stale if _WEIGHTS.fullmatch(name)]
        kwargs = {"commit_message": "Upload a Transfusion model", **kwargs}
        return api.create_commit(repo_id, operations, revision=revision, **kwargs)
