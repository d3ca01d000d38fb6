"""What the host waits for, counted on the CPU: nothing in a training or denoising step; and compiled steps."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from make_tiny_transfusion import byte_tokenizer
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from transformers import TrainingArguments

from transfusion_hf import TransfusionDataCollator, TransfusionTrainer, new_transfusion
from transfusion_hf.attention_transfusion import CHOSEN, TorchCudaKernel, varlen_attention
from transfusion_hf.diffusion_transfusion import BatchCounts
from transfusion_hf.training.trainer import _Sums

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import waiting


@pytest.mark.parametrize("variant", waiting.VARIANTS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "transfusion_varlen"])
def test_a_training_step_reads_nothing_back(attn_implementation, variant):
    model = waiting.small_model(attn_implementation, **waiting.VARIANTS[variant])
    for has_context in (False, True):
        batch = waiting.training_batch(model, has_context)
        assert not waiting.read_backs(lambda batch=batch: waiting.training_step(model, batch))
    # The counter is not blind.
    assert waiting.read_backs(lambda: waiting.training_step(model, batch | {"check_inputs": True})).total() > 5


@pytest.mark.parametrize("scheduler", [*waiting.SCHEDULERS, "flow"])
def test_a_denoising_step_reads_nothing_back(scheduler):
    options = {"prediction_type": "flow_prediction"} if scheduler == "flow" else {}
    model = waiting.small_model(**options)
    assert not waiting.drawing_step(model, **({} if options else {"scheduler": scheduler}))

    def look(model, i, t, kwargs):
        return {"interrupt": bool(kwargs["latents"].sum() > 1e9)}

    assert waiting.drawing_step(model, callback_on_step_end=look).total() == 3


def test_a_token_waits_once_for_the_library():
    assert waiting.text_step(waiting.small_model()).total() == 3  # three tokens


def samples() -> list[dict]:
    picture = torch.rand(3, 8, 8)
    return [
        {"text": "a red circle", "latents": picture},
        {"text": "words alone"},
        {"text": "<image>to<image>!", "latents": [picture, picture[:, :4]], "image_loss_mask": [False, True]},
        {"text": "b", "latents": picture[:, :4]},
    ]


@pytest.mark.parametrize("kwargs", [{}, {"max_length": 96}])
def test_the_collator_counts_what_the_batch_has(kwargs):
    model, processor = new_transfusion(byte_tokenizer(), tiny.text_config(), sample_size=8, patch_size=2)
    torch.manual_seed(0)
    batch = TransfusionDataCollator(processor, **kwargs)(samples())
    counts = batch["batch_counts"]
    assert counts.num_targets == (batch["labels"][:, 1:] != -100).sum()
    assert sum(counts.num_noised_images) == batch["image_loss_mask"].sum() == 3
    assert len(counts.num_noised_images) > 1 and counts.to("cpu") is counts
    options = {"noise_seeds": [0, 1, 2, 3]}
    expected = model(**{**batch, "batch_counts": None}, **options)
    output = model(**batch, check_inputs=False, **options)
    for name in ("loss", "lm_loss", "diffusion_loss", "image_losses", "image_timesteps"):
        assert torch.equal(output[name], expected[name])
    alone = TransfusionDataCollator(processor, **kwargs)([{"text": "words alone"}])
    assert alone["batch_counts"].num_noised_images == []
    with pytest.raises(ValueError, match=r"`max_timesteps` must lie in 1 to 1000; got \[1001\]"):
        TransfusionDataCollator(processor, **kwargs)([samples()[0] | {"max_timesteps": 1001}])


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {"batch_counts": BatchCounts(batch["batch_counts"].num_targets + 1, [4])},
        lambda batch: {"batch_counts": BatchCounts(batch["batch_counts"].num_targets - 1, [4])},
        lambda batch: {"batch_counts": BatchCounts(batch["batch_counts"].num_targets, [3])},
        lambda batch: {"latents": torch.cat([batch["latents"], batch["latents"][:1]])[:5], "max_timesteps": None,
                       "image_loss_mask": None},
        lambda batch: {"max_timesteps": torch.tensor([500, 500, 0, 500])},
        lambda batch: {"max_timesteps": torch.tensor([500, 500, 10**6, 500])},
        lambda batch: {"latents": torch.full_like(batch["latents"], torch.nan)},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_or_without_waiting_a_loss_that_is_not_a_number(change):
    model = waiting.small_model().train()
    batch = waiting.training_batch(model)
    assert model(**batch).loss.isfinite()
    batch |= change(batch)
    loss = model(**batch).loss
    assert loss.isnan()
    loss.backward()
    assert all(p.grad.isnan().any() for p in model.lm_head.parameters())  # so that no optimizer goes on
    with pytest.raises(ValueError, match=r"`batch_counts` is of another batch|images|`max_timesteps`|NaN"):
        model(**batch | {"check_inputs": True})


def test_a_step_of_the_trainer_waits_once(tmp_path, monkeypatch):
    model = waiting.small_model()
    steps, counted = [], waiting.ReadBacks(model.parameters())
    # As on a GPU, where the images are not looked at.
    batch = waiting.training_batch(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = TransfusionTrainer(
        model, arguments, train_dataset=[{"n": i} for i in range(8)], data_collator=lambda _: batch
    )
    prepare = trainer._prepare_inputs

    def prepare_and_mark(inputs):
        counted.mark([x for x in prepare(inputs).values() if isinstance(x, torch.Tensor)])
        return prepare(inputs)

    monkeypatch.setattr(trainer, "_prepare_inputs", prepare_and_mark)
    step = trainer.on_step_end

    def on_step_end(*args, **kwargs):
        steps.append(counted.found.total())
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "on_step_end", on_step_end)
    with counted:
        trainer.train()
    assert len(steps) == 4 and [b - a for a, b in pairwise(steps[1:])] == [1, 1], counted.found


@pytest.mark.slow
@pytest.mark.parametrize("variant", waiting.VARIANTS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "transfusion_varlen"])
def test_a_compiled_training_step_is_one_graph_for_batches_of_any_size(attn_implementation, variant):
    model = waiting.small_model(attn_implementation, **waiting.VARIANTS[variant]).train()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for i, (rows, words, side) in enumerate([(2, 11, 8), (3, 7, 8), (2, 20, 12), (4, 5, 8)]):
        batch = waiting.training_batch(model, num_rows=rows, num_words=words, side=side)
        results = []
        for one in (model, compiled):
            torch.manual_seed(i)
            one.zero_grad()
            loss = one(**batch).loss
            loss.backward()
            results.append([loss, *nn.utils.parameters_to_vector(p.grad for p in model.parameters()).split(1000)])
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# A GPU that nobody has: fake tensors know shapes, dtypes and devices, and refuse what would be read back.


def on_cuda(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cuda")


def move_to_cuda(model: nn.Module, batch: dict, dtype: torch.dtype) -> dict:
    """The batch, as the `Trainer` moves it; the model is changed."""
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    keeps_float32 = tensor.dtype != torch.float32 or "timestep_embedding" in path
                    moved = on_cuda(tensor, None if keeps_float32 or tensors is module._buffers else dtype)
                    tensors[name] = nn.Parameter(moved) if tensors is module._parameters else moved
    moved = {name: on_cuda(x) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    for one in batch["varlen_plan"].passes if "varlen_plan" in batch else ():
        for name in ("query_index", "key_index", "cu_queries", "cu_keys"):
            if (tensor := getattr(one, name)) is not None:
                setattr(one, name, on_cuda(tensor))
    return moved


@pytest.fixture
def fake_cuda(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    monkeypatch.setitem(CHOSEN, "cuda", TorchCudaKernel)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize("variant", waiting.VARIANTS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "transfusion_varlen"])
def test_a_training_step_runs_on_a_fake_gpu(fake_cuda, attn_implementation, variant):
    with unset_fake_temporarily():
        model = waiting.small_model(attn_implementation, **waiting.VARIANTS[variant]).train()
        batch = waiting.training_batch(model, has_context=True)
    batch = move_to_cuda(model, batch, torch.bfloat16)
    output = model(**batch)
    for name in ("loss", "lm_loss", "diffusion_loss", "image_losses", "image_timesteps"):
        assert output[name].device.type == "cuda", name
    assert output.loss.dtype == torch.float32 and output.loss.requires_grad and len(output.image_losses) == 2
    sums = _Sums(4, model.config, batch["input_ids"].device)
    sums.add(batch, output, torch.ones((), device="cuda"))
    with pytest.raises(DataDependentOutputException):  # a look at the device
        model(**batch | {"check_inputs": True})


@pytest.mark.parametrize("attn_implementation", ["sdpa", "transfusion_varlen"])
def test_a_pass_of_inference_runs_on_a_fake_gpu(fake_cuda, attn_implementation):
    with unset_fake_temporarily():
        model = waiting.small_model(attn_implementation).eval()
        batch = waiting.training_batch(model)
    batch = move_to_cuda(model, batch, torch.bfloat16)
    inputs = {name: batch[name] for name in ("input_ids", "latents", "position_ids", "varlen_plan") if name in batch}
    output = model(**inputs, timesteps=torch.full((4,), 500, device="cuda"), check_inputs=False)
    assert len(output.image_predictions) == 4
    for image in output.image_predictions:
        assert image.shape == (4, 8, 8) and image.dtype == torch.float32 and image.device.type == "cuda"
    assert output.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_the_kernels_fit_their_operators_on_a_fake_gpu(fake_cuda, heads):
    """Forward and backward as the kernels are called, against what the operators say of themselves to a compiler."""
    with unset_fake_temporarily():
        batch = waiting.training_batch(waiting.small_model("transfusion_varlen"))
    plan = batch["varlen_plan"]
    move_to_cuda(nn.Module(), batch, torch.bfloat16)
    assert len(plan.passes) == 2
    query, key, value = (
        torch.empty(plan.num_queries, n, 16, dtype=torch.bfloat16, device="cuda")
        for n in (heads[0], heads[1], heads[1])
    )
    for one in plan.passes:
        q, k = ((x if i is None else x[i]) for x, i in ((query, one.query_index), (key, one.key_index)))
        output, lse, states = TorchCudaKernel.forward(q, k, k, one, 0.25)
        assert output.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32
        promised = TorchCudaKernel.make_states(query)
        assert [(x.shape, x.dtype, x.device) for x in states] == [(x.shape, x.dtype, x.device) for x in promised]
        grads = TorchCudaKernel.backward(q, q, k, k, output, lse, states, one, 0.25)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert varlen_attention(query, key, value, plan, 0.25).shape == query.shape
