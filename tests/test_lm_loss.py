"""The LM loss: no logits where there is no label, and those of the labels overwritten by their gradient."""

import pytest
import tiny
import torch
from test_trainer import collate_uneven, uneven_samples

from transfusion_hf import diffusion_transfusion


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses_and_gradients():
    model, batch, found = tiny.model().train(), collate_uneven(uneven_samples()), []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        output = forward(**batch)
        output.loss.backward()
        found.append([output.lm_loss, output.diffusion_loss, *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=tiny.ROUNDING)


def test_without_logits_the_losses_and_gradients_are_the_same():
    for text in (tiny.text_config(), tiny.text_config("granite", logits_scaling=3.0), tiny.text_config("phi")):
        model, gradients, losses = tiny.model(text), [], []
        for skip_logits in (True, False):
            model.zero_grad()
            output = model.train()(**collate_uneven(uneven_samples()), skip_logits=skip_logits)
            assert (output.logits is None) == skip_logits
            output.loss.backward()
            losses.append(output.lm_loss)
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(*losses)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_labels_may_come_shifted(skip_logits):
    model, batch = tiny.model(), tiny.batch(0)
    expected = model(**batch, skip_logits=skip_logits)
    labels = batch.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for given in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": torch.full_like(labels, -100)}):
        output = model(**batch, **given, skip_logits=skip_logits)
        assert torch.equal(output.loss, expected.loss) and torch.equal(output.lm_loss, expected.lm_loss)


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("num_items", [None, torch.tensor(0)])
def test_images_without_a_label_of_text_have_an_lm_loss_of_0(skip_logits, num_items):
    model, batch = tiny.model(), tiny.batch(2)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    counts = {"num_items_in_batch": num_items, "num_images_in_batch": None if num_items is None else torch.tensor(2)}
    output = model(**batch, **counts, skip_logits=skip_logits)
    assert output.lm_loss == 0 and torch.isfinite(output.loss) and output.diffusion_loss > 0


def test_the_logits_become_their_own_gradient(monkeypatch):
    monkeypatch.setattr(diffusion_transfusion, "_PIECE", 40)  # pieces of 5 rows
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(8, (12,), generator=generator)
    expected = values.clone().requires_grad_()
    torch.nn.functional.cross_entropy(expected, targets, reduction="sum").mul(0.5).backward()
    leaf = values.clone().requires_grad_()
    logits, places = leaf * 1, []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    loss = diffusion_transfusion.sum_cross_entropy_(logits, targets) * 0.5
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=0, atol=1e-12)
    assert places == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match=r"goes backward once\. Pass `skip_logits=False`"):
        loss.backward()
    rounded = values.bfloat16()
    before = rounded.clone()
    torch.testing.assert_close(
        diffusion_transfusion.sum_cross_entropy_(rounded, targets),
        torch.nn.functional.cross_entropy(before.float(), targets, reduction="sum"),
    )
    assert torch.equal(rounded, before)


def test_a_loss_function_of_the_users_own_is_called():
    model = tiny.model().train()
    model.loss_function = lambda logits, labels, vocab_size, num_items, shift_labels: logits.sum() * 0 + 7
    assert model(**collate_uneven(uneven_samples())).lm_loss == 7


def test_skip_logits_needs_labels():
    ids = torch.tensor([[tiny.BOS, 5, 6]])
    with pytest.raises(ValueError, match="`skip_logits` needs `labels`, and excludes `logits_to_keep`"):
        tiny.model()(ids, skip_logits=True)
