"""`transfusion_varlen`: the decomposition, its kernels, and the model on them, against dense float64 references."""

import random

import pytest
import reference
import tiny
import torch
from test_generation import MIXED, SCRIPTS, Script, assert_rows_equal, generate, generators, prompts
from tiny import BOI, EOI, IMG
from transformers import LogitsProcessorList

from transfusion_hf import make_labels, varlen_kernels
from transfusion_hf.attention_transfusion import VARLEN_ATTENTION, _VarlenAttention, make_varlen_plan
from transfusion_hf.masking_transfusion import image_block_ids

HEADS = [(4, 4), (4, 2), (6, 1)]
BACKENDS = ["eager", "sdpa", VARLEN_ATTENTION]


def packed_row(rng: random.Random, patches=(1, 2, 3, 7)) -> tuple[list[int], list[int]]:
    """1 to 5 documents of 0 to 4 images each, behind one another: ids, and the document of each."""
    ids, documents = [], []
    for number in range(rng.randrange(1, 6)):
        document, _ = tiny.layout(rng, patches=patches)
        ids += document
        documents += [number] * len(document)
    return ids, documents


def sees_of(ids: list[int], documents: list[int]) -> list[list[bool]]:
    """The reference mask of a packed row: that of each document, and nothing across."""
    mask = reference.mask(ids, IMG)
    size = range(len(ids))
    return [[mask[i][j] and documents[i] == documents[j] for j in size] for i in size]


def states(seed: int, length: int, heads: tuple[int, int], dtype=torch.float64, dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, heads[0], dim), (length, heads[1], dim), (length, heads[1], dim)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [one.requires_grad_() for one in made]


def plan_of(ids: list[int], documents: list[int], device: str = "cpu"):
    blocks = image_block_ids(torch.tensor([ids]), IMG)
    return make_varlen_plan(torch.ones(1, len(ids)), len(ids), blocks, torch.tensor([documents]), device)


def with_gradients(function, inputs, grad) -> list[torch.Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def dense(sees: torch.Tensor, groups: int):
    def run(query, key, value):
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sees)
        return output[0].transpose(0, 1)

    return run


@pytest.mark.parametrize("seed", range(200))
def test_decomposition_equals_the_reference_in_outputs_and_gradients(seed):
    rng = random.Random(seed)
    ids, documents = packed_row(rng)
    heads, plan, sees = HEADS[seed % 3], plan_of(ids, documents), sees_of(ids, documents)
    assert plan.num_pairs == sum(map(sum, sees))  # the work is the mask's, no more and no less

    def naive(query, key, value):
        groups = heads[0] // heads[1]
        columns = [
            reference.attention_of_one_head(query[:, h], key[:, h // groups], value[:, h // groups], sees, 8**-0.5)
            for h in range(heads[0])
        ]
        return torch.stack(columns, dim=1)

    def varlen(query, key, value):
        return _VarlenAttention.apply(query, key, value, plan, 8**-0.5)

    grad = torch.randn(len(ids), heads[0], 8, dtype=torch.float64)
    expected = with_gradients(naive, states(seed, len(ids), heads), grad)
    for actual, other in zip(with_gradients(varlen, states(seed, len(ids), heads), grad), expected, strict=True):
        assert (actual - other).abs().max() <= 1e-10
    low = with_gradients(varlen, states(seed, len(ids), heads, torch.float32), grad.float())
    for actual, other in zip(low, expected, strict=True):
        assert (actual - other).abs().max() <= 1e-4


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=ON_CUDA),
        pytest.param("cuda", torch.float16, marks=ON_CUDA),
    ],
)
def test_low_precision_error_is_at_most_1_6_times_that_of_dense_attention(device, dtype):
    errors = {"dense": [], "varlen": []}
    for seed in range(30):
        ids, documents = packed_row(random.Random(seed), patches=(4, 16, 64))
        heads, plan = HEADS[seed % 3], plan_of(ids, documents, device)
        sees = torch.tensor(sees_of(ids, documents), device=device)
        grad = torch.randn(len(ids), heads[0], 16).to(device)
        low = [one.detach().to(device).requires_grad_() for one in states(seed, len(ids), heads, dtype, dim=16)]
        exact = [one.detach().double().requires_grad_() for one in low]
        reference_run = dense(sees, heads[0] // heads[1])
        expected = with_gradients(reference_run, exact, grad.double())
        runs = {
            "dense": reference_run,
            "varlen": lambda q, k, v, plan=plan: _VarlenAttention.apply(q, k, v, plan, 16**-0.5),
        }
        for name, run in runs.items():
            actual = with_gradients(run, low, grad.to(dtype))
            errors[name].append([float((a - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True)])
    dense_error, varlen_error = (torch.tensor(errors[name]).median(dim=0).values for name in ("dense", "varlen"))
    assert (varlen_error <= 1.6 * dense_error).all(), (varlen_error / dense_error).tolist()


def test_gradcheck():
    ids, documents = packed_row(random.Random(3), patches=(1, 2, 3))
    inputs = states(0, len(ids), (2, 1), dim=2)
    plan = plan_of(ids, documents)
    assert torch.autograd.gradcheck(lambda q, k, v: _VarlenAttention.apply(q, k, v, plan, 0.7), inputs)


def test_large_scores_stay_finite():
    ids, documents = packed_row(random.Random(5))
    query, key, value = states(0, len(ids), (4, 2), torch.float32)
    output = _VarlenAttention.apply(query * 20, key * 20, value, plan_of(ids, documents), 1.0)
    assert torch.isfinite(output).all() and all(
        torch.isfinite(g).all() for g in torch.autograd.grad(output.sum(), (query, key, value))
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(8))
def test_the_model_on_varlen_equals_that_on_sdpa(seed, padding_side):
    model, features = tiny.model(seed=seed), tiny.batch(seed, padding_side=padding_side)
    results = []
    for backend in ("sdpa", VARLEN_ATTENTION):
        model.set_attn_implementation(backend)
        loss = model(**features).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for expected, actual in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def packed_batch(seed: int) -> tuple[dict, list[dict]]:
    """A pack of documents in one row, as positions tell it, and the same documents as batches of one."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    documents, offset = [], 0
    for _ in range(4):
        ids, counts = tiny.layout(rng)
        ids = [*ids, tiny.EOS]
        input_ids = torch.tensor([ids])
        document = {
            "input_ids": input_ids,
            "labels": make_labels(input_ids, torch.ones_like(input_ids), BOI, IMG, EOI),
            "position_ids": torch.arange(len(ids))[None],
        }
        if counts:
            document["latents"] = [tiny.image_of(n, generator) for n in counts]
            document["noise_seeds"] = list(range(offset, offset + len(counts)))
            offset += len(counts)
        documents.append(document)
    pack = {name: torch.cat([d[name] for d in documents], dim=1) for name in ("input_ids", "labels", "position_ids")}
    for name in ("latents", "noise_seeds"):
        pack[name] = [value for d in documents for value in d.get(name, [])]
    return pack, documents


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_packed_documents_equal_each_alone_in_losses_and_gradients(backend, seed):
    model = tiny.model(seed=seed)
    model.set_attn_implementation(backend)
    pack, documents = packed_batch(seed)
    output = model(**pack)
    alone = [model(**document) for document in documents]
    labels = [int((d["labels"][:, 1:] != -100).sum()) for d in documents]
    images = [len(d.get("latents", [])) for d in documents]
    lm_loss = sum(o.lm_loss * n for o, n in zip(alone, labels, strict=True)) / sum(labels)
    diffusion_loss = sum(o.diffusion_loss * n for o, n in zip(alone, images, strict=True)) / max(sum(images), 1)
    torch.testing.assert_close(output.lm_loss, lm_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.diffusion_loss, diffusion_loss, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(lm_loss + 5 * diffusion_loss, parameters, allow_unused=True)
    for actual, other in zip(torch.autograd.grad(output.loss, parameters, allow_unused=True), expected, strict=True):
        if other is not None:
            torch.testing.assert_close(actual, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", [*BACKENDS, "flex_attention"])
def test_nothing_leaks_between_documents_and_every_patch_reaches_its_image(backend):
    model = tiny.model()
    model.set_attn_implementation(backend)
    image = [BOI] + [IMG] * 4 + [EOI]
    ids = torch.tensor([[5, *image, 6, 7, *image, *image, 8]])  # two documents, the second from position 8 on
    positions = torch.cat([torch.arange(8), torch.arange(14)])[None]
    latents = torch.randn(3, 2, 4, 4)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return model.model(ids, latents, position_ids=positions).last_hidden_state[0]

    before = hidden()
    latents[0, :, 3, 3] += 1  # last patch of the first document's image
    changed = (hidden() != before).any(dim=-1)
    assert changed[2:8].all() and not changed[:2].any() and not changed[8:].any()
    before = hidden()
    latents[1, :, 0, 0] += 1
    changed = (hidden() != before).any(dim=-1)
    assert not changed[:10].any() and changed[10:].all()
    before = hidden()
    ids[0, 15] = 9  # <EOI> of the second image: text behind it changes, nothing before
    changed = (hidden() != before).any(dim=-1)
    assert not changed[:15].any() and changed[15:].all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_on_varlen_equals_that_on_sdpa(guidance):
    inputs, kwargs = prompts(*MIXED), {"image_guidance_scale": guidance}
    kwargs["logits_processor"] = LogitsProcessorList([Script(SCRIPTS)])
    model = tiny.model()
    expected = generate(model, inputs, generator=generators(4), **kwargs)
    model.set_attn_implementation(VARLEN_ATTENTION)
    actual = generate(model, inputs, generator=generators(4), **kwargs)
    for row in range(4):
        assert_rows_equal(actual, row, expected, inputs, inputs, row)


def test_the_kernels_say_why_they_are_off():
    kernels = varlen_kernels()
    assert kernels["torch_cpu"] == "available"
    assert kernels["torch_cuda"] == ("available" if torch.cuda.is_available() else "torch sees no CUDA device")


def on_varlen(text=None, **kwargs):
    model = tiny.model(text, **kwargs)
    model.set_attn_implementation(VARLEN_ATTENTION)
    return model


def test_what_the_kernels_cannot_do_is_refused():
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"this layer has `sliding_window=6`; use 'sdpa'"):
        on_varlen(tiny.gemma3())(ids)
    with pytest.raises(ValueError, match=r"this layer has `softcap=50.0`"):
        on_varlen(tiny.text_config("gemma2", layer_types=["full_attention"] * 2))(ids)
    with pytest.raises(
        ValueError, match=r"on cpu computes in torch.float32, torch.float64, torch.bfloat16; got torch.float16"
    ):
        on_varlen(dtype=torch.float16)(ids)
    with pytest.raises(ValueError, match=r"has no dropout; got 0\.1"):
        on_varlen(tiny.text_config(attention_dropout=0.1)).train()(ids)
    with pytest.raises(ValueError, match="needs the plan that `TransfusionModel` makes"):
        on_varlen().model.language_model(ids)
    plan = make_varlen_plan(torch.ones(1, 5), 5)
    with pytest.raises(ValueError, match=r"`varlen_plan` is for 5 queries and 5 keys, but there are 3 and 3"):
        on_varlen().model(ids, attention_mask=plan)
    with pytest.raises(ValueError, match="which a cache cannot continue"):
        make_varlen_plan(torch.ones(1, 5), 3, document_ids=torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", VARLEN_ATTENTION])
def test_compiled_model_agrees_and_does_not_recompile_for_other_layouts(backend):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny.model()
    model.set_attn_implementation(backend)
    compiled, image, graphs = torch.compile(model), [BOI] + [IMG] * 4 + [EOI], []
    for before in (3, 5, 8):
        ids = torch.tensor([[5] * before + image + [6] * (20 - before) + image + [7, 7]])
        features = {
            "input_ids": ids,
            "latents": torch.randn(2, 2, 4, 4),
            "labels": torch.where(ids >= IMG, -100, ids),
            "noise_seeds": [1, 2],
        }
        gradients = []
        for one in (model, compiled):
            gradients.append(torch.autograd.grad(one(**features).loss, list(model.parameters()), allow_unused=True))
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1], graphs
