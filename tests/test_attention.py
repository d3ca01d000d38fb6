"""`transfusion_varlen`: the decomposition, its kernels, and the model on them, against dense float64 references."""

import random
import re
from itertools import pairwise

import pytest
import reference
import tiny
import torch
from test_generation import MIXED, SCRIPTS, Script, assert_rows_equal, generate, generators, prompts
from tiny import BOI, EOI, IMG
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LogitsProcessorList
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from transfusion_hf import make_labels, set_varlen_kernel, varlen_kernels
from transfusion_hf.attention_transfusion import (
    CHOSEN,
    VARLEN_ATTENTION,
    make_varlen_plan,
    varlen_attention,
)
from transfusion_hf.kernels import FlashAttnKernel, flash_attn
from transfusion_hf.masking_transfusion import (
    attention_block_ids,
    create_transfusion_mask,
    image_block_ids,
    make_packed_plan,
)

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


def blocks_of(ids: list[int]) -> list[int]:
    """The number of each position's image with its markers, −1 elsewhere."""
    blocks, number = [-1] * len(ids), -1
    for i, token in enumerate(ids):
        if token == IMG:
            number += ids[i - 1] != IMG
            for place in (i - 1, i, i + 1):
                blocks[place] = number
    return blocks


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


def naive(heads: tuple[int, int], sees: list[list[bool]]):
    groups = heads[0] // heads[1]

    def run(query, key, value):
        columns = [
            reference.attention_of_one_head(query[:, h], key[:, h // groups], value[:, h // groups], sees, 8**-0.5)
            for h in range(heads[0])
        ]
        return torch.stack(columns, dim=1)

    return run


@pytest.mark.parametrize("seed", range(30))
def test_decomposition_equals_the_reference_in_outputs_and_gradients(seed):
    rng = random.Random(seed)
    ids, documents = packed_row(rng)
    heads, plan, sees = HEADS[seed % 3], plan_of(ids, documents), sees_of(ids, documents)
    pairs = [
        q * (q + 1) // 2 if one.is_causal else q * k for one in plan.passes for q, k in zip(*one.lengths, strict=True)
    ]
    assert sum(pairs) == sum(map(sum, sees))  # the work is the mask's, no more and no less

    def varlen(query, key, value):
        return varlen_attention(query, key, value, plan, 8**-0.5)

    grad = torch.randn(len(ids), heads[0], 8, dtype=torch.float64)
    expected = with_gradients(naive(heads, sees), states(seed, len(ids), heads), grad)
    for actual, other in zip(with_gradients(varlen, states(seed, len(ids), heads), grad), expected, strict=True):
        assert (actual - other).abs().max() <= 1e-10
    low = with_gradients(varlen, states(seed, len(ids), heads, torch.float32), grad.float())
    for actual, other in zip(low, expected, strict=True):
        assert (actual - other).abs().max() <= 1e-4


def through_transformers(backend: str, ids: list[int], documents: list[int], heads: tuple[int, int]):
    """The attention function of a transformers backend, under the mask that the model gives it."""
    config = LlamaConfig(hidden_size=8 * heads[0], num_attention_heads=heads[0], num_key_value_heads=heads[1])
    config._attn_implementation = backend
    layer = LlamaAttention(config, layer_idx=0)
    positions = [i - documents.index(number) for i, number in enumerate(documents)]
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)

    def run(query, key, value):
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        blocks = image_block_ids(torch.tensor([ids], device=query.device), IMG)
        position_ids = torch.tensor([positions], device=query.device)
        mask = create_transfusion_mask(config, query[0, 0][None], blocks, None, None, position_ids)
        return interface(layer, query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0][0]

    return run


@pytest.mark.parametrize("seed", range(15))
def test_decomposition_with_markers_and_hidden_images_has_each_pair_once(seed):
    rng = random.Random(seed)
    ids, documents = packed_row(rng)
    blocks, size = blocks_of(ids), range(len(ids))
    apart = {number for number in set(blocks) - {-1} if rng.random() < 0.4}
    sees = [
        [
            documents[i] == documents[j]
            and ((i >= j and blocks[j] not in apart) or (blocks[i] == blocks[j] != -1))
            for j in size
        ]
        for i in size
    ]  # fmt: skip
    config = tiny.config(image_markers_in_block=True, hide_noised_images=True)
    found = attention_block_ids(torch.tensor([ids]), config)
    assert [[a == b for a in found[0]] for b in found[0]] == [[a == b for a in blocks] for b in blocks]
    hidden = torch.tensor([[number in apart for number in blocks]])
    plan = make_varlen_plan(torch.ones(1, len(ids)), len(ids), found, torch.tensor([documents]), hidden=hidden)
    pairs = [
        q * (q + 1) // 2 if one.is_causal else q * k for one in plan.passes for q, k in zip(*one.lengths, strict=True)
    ]
    assert sum(pairs) == sum(map(sum, sees))

    def varlen(query, key, value):
        return varlen_attention(query, key, value, plan, 8**-0.5)

    heads = HEADS[seed % 3]
    grad = torch.randn(len(ids), heads[0], 8, dtype=torch.float64)
    expected = with_gradients(naive(heads, sees), states(seed, len(ids), heads), grad)
    for actual, other in zip(with_gradients(varlen, states(seed, len(ids), heads), grad), expected, strict=True):
        assert (actual - other).abs().max() <= 1e-10


# transformers' eager softmax is in float32 whatever the dtype.
@pytest.mark.parametrize(("backend", "bound"), [("eager", 2e-6), ("sdpa", 1e-10)])
@pytest.mark.parametrize("seed", range(30))
def test_dense_backends_equal_the_reference_in_outputs_and_gradients(backend, bound, seed):
    ids, documents = packed_row(random.Random(seed))
    heads = HEADS[seed % 3]
    run = through_transformers(backend, ids, documents, heads)
    grad = torch.randn(len(ids), heads[0], 8, dtype=torch.float64)
    expected = with_gradients(naive(heads, sees_of(ids, documents)), states(seed, len(ids), heads), grad)
    for dtype, limit in ((torch.float64, bound), (torch.float32, 1e-4)):
        actual = with_gradients(run, states(seed, len(ids), heads, dtype), grad.to(dtype))
        for one, other in zip(actual, expected, strict=True):
            assert (one - other).abs().max() <= limit


def test_flex_attention_equals_the_reference_forward():
    for seed in range(9):
        ids, documents = packed_row(random.Random(seed))
        padding = 256 - len(ids)  # a document of its own, as the collator's
        ids, documents = ids + [tiny.PAD] * padding, documents + [99] * padding
        with torch.no_grad(), tiny.uncompiled():
            inputs = [one.detach() for one in states(seed, 256, (4, 2), torch.float32)]
            actual = through_transformers("flex_attention", ids, documents, (4, 2))(*inputs)
            expected = naive((4, 2), sees_of(ids, documents))(*(one.double() for one in inputs))
        assert (actual - expected).abs().max() <= 1e-4


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
    errors = {"dense": [], VARLEN_ATTENTION: []}
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
            VARLEN_ATTENTION: lambda q, k, v, plan=plan: varlen_attention(q, k, v, plan, 16**-0.5),
        }
        for name, run in runs.items():
            actual = with_gradients(run, low, grad.to(dtype))
            errors[name].append([float((a - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True)])
    dense_error, own_error = (torch.tensor(errors[name]).median(dim=0).values for name in errors)
    assert (own_error <= 1.6 * dense_error).all(), (own_error / dense_error).tolist()


@ON_CUDA
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dense_backends_on_cuda_equal_the_reference_in_float32(backend):
    for seed in range(30):
        ids, documents = packed_row(random.Random(seed))
        heads = HEADS[seed % 3]
        run = through_transformers(backend, ids, documents, heads)
        grad = torch.randn(len(ids), heads[0], 8, dtype=torch.float64)
        expected = with_gradients(naive(heads, sees_of(ids, documents)), states(seed, len(ids), heads), grad)
        inputs = [one.detach().cuda().requires_grad_() for one in states(seed, len(ids), heads, torch.float32)]
        for one, other in zip(with_gradients(run, inputs, grad.float().cuda()), expected, strict=True):
            assert (one.cpu() - other).abs().max() <= 1e-4


def test_gradcheck():
    ids, documents = packed_row(random.Random(3), patches=(1, 2, 3))
    inputs = states(0, len(ids), (2, 1), dim=2)
    plan = plan_of(ids, documents)
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, plan, 0.7), inputs)


def test_large_scores_stay_finite():
    ids, documents = packed_row(random.Random(5))
    query, key, value = states(0, len(ids), (4, 2), torch.float32)
    output = varlen_attention(query * 20, key * 20, value, plan_of(ids, documents), 1.0)
    assert torch.isfinite(output).all() and all(
        torch.isfinite(g).all() for g in torch.autograd.grad(output.sum(), (query, key, value))
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(8))
def test_the_model_on_varlen_equals_that_on_sdpa(seed, padding_side):
    model = tiny.model(seed=seed, **tiny.drawn_fields(seed if seed >= 4 else 0))
    features = tiny.batch(seed, padding_side=padding_side)
    results = []
    for backend in ("sdpa", VARLEN_ATTENTION):
        model.set_attn_implementation(backend)
        loss = model(**features).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for expected, actual in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_varlen_scales_scores_as_the_family_does():
    """Granite multiplies by a number of its own, not by 1 / √dim."""
    model, features = tiny.model(tiny.text_config("granite", attention_multiplier=0.1)), tiny.batch(0)
    expected = model(**features).loss
    model.set_attn_implementation(VARLEN_ATTENTION)
    torch.testing.assert_close(model(**features).loss, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_varlen_under_autocast_equals_sdpa_within_bfloat16(family):
    model, losses = tiny.model(tiny.text_config(family), std=0.1).train(), []
    for backend in ("sdpa", VARLEN_ATTENTION):
        model.set_attn_implementation(backend)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**tiny.batch(1)).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, atol=0.02, rtol=0.02)


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


@pytest.mark.parametrize(
    ("backend", "options"),
    [*((b, o) for b in BACKENDS for o in ({}, tiny.drawn_fields(1))), (VARLEN_ATTENTION, tiny.UNET)],
)
@pytest.mark.parametrize("seed", range(4))
def test_packed_documents_equal_each_alone_in_losses_and_gradients(backend, options, seed):
    model = tiny.model(seed=seed, **options)
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
        with torch.no_grad(), tiny.uncompiled():
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


def test_the_kernels_say_which_is_in_use_and_why_the_others_are_off():
    kernels = varlen_kernels()
    assert kernels["torch_cpu"] == "in use"
    assert kernels["torch_cuda"] == ("in use" if torch.cuda.is_available() else "torch sees no CUDA device")
    if flash_attn.flash_attn_interface is None:
        reason = r"No module named 'flash_attn' \(`pip install flash-attn --no-build-isolation`\)"
        assert re.fullmatch(reason, kernels["flash_attn"])
        with pytest.raises(ValueError, match=f"The kernel 'flash_attn' cannot be used: {reason}"):
            set_varlen_kernel("flash_attn")
    with pytest.raises(ValueError, match="`name` must be one of torch_cuda, torch_cpu, flash_attn; got 'triton'"):
        set_varlen_kernel("triton")


class FlashAttnStandIn:
    """
    The two functions of `flash_attn.flash_attn_interface` (2.8) that are called, with its signatures, shapes and rules
    (causal is aligned at the bottom right, lse is (heads, tokens), gradients are written into what is passed), in
    dense float64.
    """

    @staticmethod
    def _scores(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.full((q.shape[1], len(q), len(k)), -torch.inf, dtype=q.dtype)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
            part = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * softmax_scale
            sees = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).bool() if causal else torch.tensor(True)
            scores[:, q0:q1, k0:k1] = part.masked_fill(~sees, -torch.inf)
        return scores

    @classmethod
    def _flash_attn_varlen_forward(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        scores = cls._scores(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v), scores.logsumexp(dim=-1), None, torch.zeros(2)

    @classmethod
    def _flash_attn_varlen_backward(
        cls, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert dout.is_contiguous() and softmax_lse.is_contiguous() and softmax_lse.shape == (q.shape[1], len(q))
        assert rng_state is not None and (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
        groups = q.shape[1] // k.shape[1]
        scores = cls._scores(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        p = (scores - softmax_lse[..., None]).exp()
        dp = torch.einsum("qhd,khd->hqk", dout, v.repeat_interleave(groups, dim=1))
        ds = p * (dp - (dout * out).sum(dim=-1).T[..., None]) * softmax_scale
        dq.copy_(torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(groups, dim=1)))
        for target, weights, states in ((dk, ds, q), (dv, p, dout)):
            target.copy_(torch.einsum("hqk,qhd->khd", weights, states).unflatten(1, (-1, groups)).sum(dim=2))


def test_the_flash_attn_package_is_called_as_it_wants_to_be(monkeypatch):
    monkeypatch.setattr(flash_attn, "flash_attn_interface", FlashAttnStandIn)
    monkeypatch.delitem(CHOSEN, "cpu", raising=False)
    monkeypatch.setattr(FlashAttnKernel, "unavailable", staticmethod(lambda: None))
    for heads, seed in zip(HEADS * 3, range(9), strict=True):
        ids, documents = packed_row(random.Random(seed))
        grad, plan = torch.randn(len(ids), heads[0], 8, dtype=torch.float64), plan_of(ids, documents)
        results = []
        for dtype, device_type in (((torch.float16, torch.bfloat16), "cuda"), ((torch.float64,), "cpu")):
            monkeypatch.setattr(FlashAttnKernel, "dtypes", dtype)
            monkeypatch.setattr(FlashAttnKernel, "device_type", device_type)
            if device_type == "cpu":
                set_varlen_kernel("flash_attn")
                assert varlen_kernels()["flash_attn"] == "in use" and varlen_kernels()["torch_cpu"] == "available"
            else:
                set_varlen_kernel("torch_cpu")
            results.append(
                with_gradients(
                    lambda q, k, v, plan=plan: varlen_attention(q, k, v, plan, 8**-0.5),
                    states(seed, len(ids), heads),
                    grad,
                )
            )
        for expected, actual in zip(*results, strict=True):
            assert (expected - actual).abs().max() <= 1e-10
    with pytest.raises(ValueError, match=r"multiples of 8; got 4\. Use"):
        varlen_attention(*states(0, len(ids), (2, 2), dim=4), plan, 1.0)
    monkeypatch.setattr(FlashAttnKernel, "dtypes", (torch.float16, torch.bfloat16))
    message = (
        "with the kernel 'flash_attn' computes in torch.float16, torch.bfloat16; got torch.float32. Load the model"
    )
    with pytest.raises(ValueError, match=message):
        varlen_attention(*states(0, len(ids), (2, 2), torch.float32), plan, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_may_be_handed_in(seed):
    model, (pack, _) = tiny.model(), packed_batch(seed)
    model.set_attn_implementation(VARLEN_ATTENTION)
    plan = make_packed_plan(pack["input_ids"], pack["position_ids"], IMG)
    assert torch.equal(model(**pack).loss, model(**pack, varlen_plan=plan).loss)


def test_a_plan_of_another_batch_is_refused():
    model, (pack, _) = tiny.model(), packed_batch(0)
    ids, positions = pack["input_ids"], pack["position_ids"]
    plan = make_packed_plan(ids, positions, IMG)
    with pytest.raises(
        ValueError, match="`varlen_plan` is for `attn_implementation='transfusion_varlen'`; this model"
    ):
        model(**pack, varlen_plan=plan)
    model.set_attn_implementation(VARLEN_ATTENTION)
    for other, what in (
        (make_packed_plan(ids.roll(1), positions, IMG), "images"),
        (make_packed_plan(ids[:, 1:], positions[:, 1:], IMG), "images"),
        (make_packed_plan(ids, torch.arange(ids.shape[1])[None], IMG), "documents"),
    ):
        with pytest.raises(ValueError, match=f"`varlen_plan` was made for other {what} than those of `input_ids`"):
            model(**pack, varlen_plan=other)
    with pytest.raises(ValueError, match="`varlen_plan` excludes `attention_mask` and `cache`"):
        model(**pack, varlen_plan=plan, attention_mask=torch.ones_like(ids))
    model.config.bidirectional_image_attention = False
    with pytest.raises(ValueError, match=r"other images .* model with bidirectional attention .* pass none"):
        model(**pack, varlen_plan=plan)


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
        ValueError, match=r"'torch_cpu' computes in torch.float32, torch.float64, torch.bfloat16; got torch.float16"
    ):
        on_varlen(dtype=torch.float16)(ids)
    with pytest.raises(ValueError, match=r"has no dropout; got 0\.1"):
        on_varlen(tiny.text_config(attention_dropout=0.1)).train()(ids)
    with pytest.raises(ValueError, match="needs the plan that `TransfusionModel` makes"):
        on_varlen().model.language_model(ids)
    with pytest.raises(ValueError, match=r"do not hand it on \(StableLM\), use 'sdpa'"):
        on_varlen(tiny.text_config("stablelm"))(ids)
    plan = make_varlen_plan(torch.ones(1, 5), 5)
    with pytest.raises(
        ValueError, match=r"`varlen_plan` is for \(5, 5\) queries and keys, not \(3, 3\); make it from"
    ):
        on_varlen().model(ids, attention_mask=plan)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", VARLEN_ATTENTION])
def test_compiled_model_agrees_and_does_not_recompile_for_other_layouts(backend):
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
