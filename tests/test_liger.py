"""Liger's fused cross-entropy, by a stand-in of its signature: its own kernel runs on GPUs alone."""

import sys
from types import ModuleType

import pytest
import tiny
import torch
from test_trainer import collate_uneven, uneven_samples
from transformers import TrainingArguments

from transfusion_hf import TransfusionTrainer


class StandIn(torch.nn.Module):
    """What liger-kernel 0.8 documents of the arguments used here: `(lin_weight, _input, target, bias)`."""

    calls: list[torch.Size] = []

    def __init__(self, reduction: str = "mean", softcap: float | None = None):
        super().__init__()
        self.reduction, self.softcap = reduction, softcap

    def forward(self, lin_weight, _input, target, bias=None):
        assert _input.ndim == 2 and len(target) == len(_input) > 0
        self.calls.append(_input.shape)
        logits = torch.nn.functional.linear(_input, lin_weight, bias).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return torch.nn.functional.cross_entropy(logits, target, reduction=self.reduction)


@pytest.fixture
def liger(monkeypatch):
    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = StandIn
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(StandIn, "calls", [])


@pytest.mark.parametrize("family", ["llama", "phi", "cohere", "granite", "gemma2"])
def test_the_fused_loss_is_the_plain_one(liger, family):
    """With a bias, scales and a soft-cap of the logits; also in a part of a batch."""
    text = tiny.text_config(family)
    for name, value in (("logit_scale", 0.3), ("logits_scaling", 2.5), ("final_logit_softcapping", 1.5)):
        if hasattr(text, name):
            setattr(text, name, value)
    model, batch = tiny.model(text).train(), collate_uneven(uneven_samples())
    found = {}
    for model.use_liger_loss in (False, True):
        model.zero_grad()
        outputs = model(**batch, num_items_in_batch=100, num_images_in_batch=7)
        outputs.loss.backward()
        assert outputs.logits is None
        found[model.use_liger_loss] = [outputs.lm_loss, *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=tiny.ROUNDING)
    assert StandIn.calls == [(int((batch["labels"][:, 1:] != -100).sum()), 32)]


def test_without_a_label_or_where_logits_are_wanted_the_head_runs_as_ever(liger):
    model, batch = tiny.model().train(), collate_uneven(uneven_samples())
    model.use_liger_loss = True
    assert model(**batch, skip_logits=False).logits is not None
    assert model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).lm_loss == 0
    assert model.eval()(**batch).logits is not None
    assert not StandIn.calls


def test_the_trainer_turns_it_on_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    args = TrainingArguments(str(tmp_path), use_liger_kernel=True, report_to="none", use_cpu=True)
    model = tiny.model().train()
    TransfusionTrainer(model, args, train_dataset=uneven_samples(), data_collator=collate_uneven)
    with pytest.raises(ImportError, match="`use_liger_loss` needs Liger; `pip install liger-kernel`"):
        model(**collate_uneven(uneven_samples()))
