"""
Transfusion's attention (Fig. 4, arXiv 2408.11039) exactly, on kernels that know only causal and full attention.

The mask is cut into *passes* whose pairs of query and key are disjoint and together are the mask:

1. causal attention over each document;
2. within each image, the block [s, e), the strict upper triangle: rows s … e−2 against keys s+1 … e−1, both reversed,
   are causal again, since with i = e−2−a and j = e−1−b: j ≥ i+1 ⇔ b ≤ a;
3. behind a cache, full attention of the new positions to those cached.

Blocks that others must not see are left out of the first two; each attends fully to itself and to what it sees of the
document before it.

Outputs are merged by their log-sum-exp. In the backward pass dS = P∘(dO·Vᵀ − rowsum(dO∘O)) with P = exp(S − lse) needs
of the other passes only the final output and lse: the kernel's own backward, called with those, gives a pass's share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

VARLEN_ATTENTION = "transfusion_varlen"


@dataclass
class VarlenPass:
    """
    One call of a varlen kernel: segments of queries, each against its segment of keys.

    Args:
        query_index (`torch.LongTensor` of shape `(num_queries,)`, *optional*):
            Rows of the flattened queries `(batch · seq, heads, dim)`, segment by segment. `None`: all, in order.
        key_index (`torch.LongTensor` of shape `(num_keys,)`, *optional*): The same for keys and values.
        cu_queries, cu_keys (`torch.IntTensor` of shape `(num_segments + 1,)`): Where the segments begin, and the end.
        max_queries, max_keys (`int`): Length of the longest segment.
        is_causal (`bool`): Whether a query sees only the keys up to its own; segments are square then.
    """

    query_index: torch.Tensor | None
    key_index: torch.Tensor | None
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int
    is_causal: bool

    @property
    def segments(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """As FlashAttention takes them."""
        return self.cu_queries, self.cu_keys, self.max_queries, self.max_keys

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Length of each segment of queries, and of keys. On a GPU this is a synchronisation."""
        return self.cu_queries.diff().tolist(), self.cu_keys.diff().tolist()


def _pass(query_index, key_index, query_lengths: list[int], key_lengths: list[int], is_causal: bool) -> VarlenPass:
    queries, keys = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (query_lengths, key_lengths))
    return VarlenPass(query_index, key_index, queries, keys, max(query_lengths), max(key_lengths), is_causal)


@dataclass
class VarlenPlan:
    """
    The passes of a batch, made once and used by every layer; the numbers of flattened queries and keys, with cache and
    padding; the images and documents that it was made for, `torch.LongTensor` of shape `(batch, seq)`.
    """

    passes: list[VarlenPass]
    num_queries: int
    num_keys: int
    block_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "VarlenPlan":
        for one in self.passes:
            for name in ("query_index", "key_index", "cu_queries", "cu_keys"):
                if (tensor := getattr(one, name)) is not None:
                    setattr(one, name, tensor.to(device, non_blocking=non_blocking))
        return self


@torch.compiler.disable
def make_varlen_plan(
    real, seq: int, block_ids=None, document_ids=None, device: Any = "cpu", hidden=None
) -> VarlenPlan:
    """
    Cuts Transfusion's mask into passes, on the CPU.

    Args:
        real (`torch.BoolTensor` of shape `(batch, past + seq)`): `False` at padding.
        seq (`int`): Number of new positions.
        block_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
            Of the new positions, from `image_block_ids`. `None`: causal throughout.
        document_ids (the same): Documents packed into a row, in runs; without a cache only.
        device (`torch.device`): Where to put the plan.
        hidden (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            `True` in images that no position outside of their own block may attend to.
    """
    real = real.bool().cpu()
    batch, num_keys = real.shape
    past = num_keys - seq
    rows = torch.arange(batch)[:, None].expand(batch, seq)
    queries = torch.arange(batch * seq).view(batch, seq)
    keys = torch.arange(batch * num_keys).view(batch, num_keys)
    cached, new, new_keys = real[:, :past], real[:, past:], keys[:, past:]
    is_whole = bool(new.all())
    blocks = None if block_ids is None else block_ids.cpu()
    passes = []

    if past and is_whole and (seq == 1 or (blocks is not None and bool((blocks == 0).all()))):
        # Behind a cache, an image alone or a single token sees all there is: one full pass.
        passes.append(_pass(queries.flatten(), keys[real], [seq] * batch, real.sum(dim=1).tolist(), False))
        return VarlenPlan(passes, batch * seq, batch * num_keys, block_ids, document_ids).to(device)

    labels = rows if document_ids is None else rows * (int(document_ids.max()) + 1) + document_ids.cpu()
    apart = torch.zeros_like(new) if hidden is None else hidden.cpu() & new
    seen_new, documents = new & ~apart, labels
    if seen_new.any():
        lengths = torch.unique_consecutive(labels[seen_new], return_counts=True)[1].tolist()
        is_all = is_whole and not past and not apart.any()
        query_index, key_index = (None, None) if is_all else (queries[seen_new], new_keys[seen_new])
        passes.append(_pass(query_index, key_index, lengths, lengths, is_causal=True))

    if cached.any():
        chosen = new & cached.any(dim=1, keepdim=True)
        seen = cached & new.any(dim=1, keepdim=True)
        query_lengths, key_lengths = ([n for n in mask.sum(dim=1).tolist() if n] for mask in (chosen, seen))
        passes.append(_pass(queries[chosen], keys[:, :past][seen], query_lengths, key_lengths, is_causal=False))

    if blocks is not None:
        is_patch = (blocks >= 0) & seen_new
        labels = rows * (int(blocks.max()) + 1) + blocks
        lengths = torch.unique_consecutive(labels[is_patch], return_counts=True)[1].tolist()
        if any(n > 1 for n in lengths):
            query_index = torch.cat([part[:-1].flip(0) for part in queries[is_patch].split(lengths)])
            key_index = torch.cat([part[1:].flip(0) for part in new_keys[is_patch].split(lengths)])
            lengths = [n - 1 for n in lengths if n > 1]
            passes.append(_pass(query_index, key_index, lengths, lengths, is_causal=True))
    if apart.any():
        assert blocks is not None
        labels = rows * (int(blocks.max()) + 1) + blocks
        own = [(labels == label) & apart for label in torch.unique(labels[apart])]
        before = [seen_new & (documents == documents[one][0]) & (queries < queries[one][0]) for one in own]
        for targets in (own, before):
            pairs = [pair for pair in zip(own, targets, strict=True) if pair[1].any()]
            if pairs:
                index = (torch.cat([x[pair[i]] for pair in pairs]) for i, x in enumerate((queries, new_keys)))
                lengths = ([int(pair[i].sum()) for pair in pairs] for i in range(2))
                (query_index, key_index), (query_lengths, key_lengths) = index, lengths
                passes.append(_pass(query_index, key_index, query_lengths, key_lengths, is_causal=False))
    return VarlenPlan(passes, batch * seq, batch * num_keys, block_ids, document_ids).to(device)


class TorchCpuKernel:
    """torch's flash attention for the CPU, on neighbouring segments of one shape at a time."""

    name = "torch_cpu"
    device_type = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16)

    @staticmethod
    def unavailable() -> str | None:
        return None

    @staticmethod
    def _by_shape(function: Any, one: VarlenPass, queries: tuple, keys: tuple) -> list[torch.Tensor]:
        """Calls a function with the segments of one shape at a time, `(segments, heads, length, dim)`."""
        groups = queries[0].shape[1] // keys[0].shape[1]
        if groups > 1:
            keys = tuple(states.repeat_interleave(groups, dim=1) for states in keys)
        starts, parts = [0, 0], []
        for lengths, group in groupby(zip(*one.lengths, strict=True)):
            count, pieces = len(list(group)), []
            for i, tensors in enumerate((queries, keys)):
                part = slice(starts[i], starts[i] + count * lengths[i])
                pieces += [states[part].unflatten(0, (count, lengths[i])).transpose(1, 2) for states in tensors]
                starts[i] = part.stop
            parts.append([states.transpose(1, 2).flatten(0, 1) for states in function(*pieces)])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    @classmethod
    def forward(cls, query, key, value, one: VarlenPass, scale: float):
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        options = {"dropout_p": 0.0, "is_causal": one.is_causal, "scale": scale}
        return *cls._by_shape(partial(attend, **options), one, (query,), (key, value)), []

    @staticmethod
    def make_states(query) -> list[torch.Tensor]:
        return []

    @classmethod
    def backward(cls, grad, query, key, value, output, lse, state, one: VarlenPass, scale: float):
        def pull_back(g, q, o, n, k, v):
            attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            return attend_backward(g, q, k, v, o, n[..., 0], 0.0, one.is_causal, scale=scale)

        states = (grad, query, output, lse[..., None])
        grad_query, *grads = cls._by_shape(pull_back, one, states, (key, value))
        if (groups := query.shape[1] // key.shape[1]) > 1:
            grads = [states.unflatten(1, (-1, groups)).sum(dim=2) for states in grads]
        return grad_query, *grads


class TorchCudaKernel:
    """torch's own FlashAttention for CUDA: 2, or what `torch.nn.attention.activate_flash_attention_impl` put there."""

    name = "torch_cuda"
    device_type = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    @staticmethod
    def unavailable() -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"

    @staticmethod
    def forward(query, key, value, one: VarlenPass, scale: float):
        output, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *one.segments, 0.0, one.is_causal, False, scale=scale
        )
        return output, lse.transpose(0, 1), [rng_state, unused]

    @staticmethod
    def make_states(query) -> list[torch.Tensor]:
        """What `forward` returns behind output and lse, by shape and dtype alone."""
        return [query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)]

    @staticmethod
    def backward(grad, query, key, value, output, lse, state, one: VarlenPass, scale: float):
        attend_backward = torch.ops.aten._flash_attention_backward
        states = (grad.contiguous(), query, key, value, output, lse.transpose(0, 1).contiguous())
        return attend_backward(*states, *one.segments, 0.0, one.is_causal, *state, scale=scale)


Kernel = type[TorchCpuKernel] | type[TorchCudaKernel]
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (TorchCudaKernel, TorchCpuKernel)}  # best first
CHOSEN: dict[str, Kernel | None] = {}  # by device, for the whole process


def varlen_kernels() -> dict[str, str]:
    """The kernels of `"transfusion_varlen"`: for each `"in use"` on its device, `"available"`, or why it is not."""
    in_use = [_choose(kernel.device_type) for kernel in KERNELS.values()]
    return {name: k.unavailable() or ("in use" if k in in_use else "available") for name, k in KERNELS.items()}


def _choose(device_type: str) -> Kernel | None:
    """The kernel of a device, chosen once; `None` where there is none."""
    if device_type not in CHOSEN:
        usable = (k for k in KERNELS.values() if k.device_type == device_type and not k.unavailable())
        CHOSEN[device_type] = next(usable, None)
    return CHOSEN[device_type]


def _kernel_for(query: torch.Tensor) -> Kernel:
    """The kernel for a tensor's device, once it is sure to take it."""
    kernel, device, dim = _choose(query.device.type), query.device.type, query.shape[-1]
    if kernel is None:
        raise ValueError(f"`{VARLEN_ATTENTION}` has no kernel for {device}: {varlen_kernels()}. Use 'sdpa' there.")
    if query.dtype not in kernel.dtypes:
        raise ValueError(
            f"`{VARLEN_ATTENTION}` with the kernel {kernel.name!r} computes in "
            f"{', '.join(map(str, kernel.dtypes))}; got {query.dtype}. Load the model in one of these, or use 'sdpa'."
        )
    if kernel is not TorchCpuKernel and (dim > 256 or dim % 8):
        raise ValueError(f"FlashAttention takes head sizes up to 256, multiples of 8; got {dim}. Use 'sdpa'.")
    return kernel


def _rows(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return states if index is None else states.index_select(0, index)


# Two operators that `torch.compile` puts into its graph as they are. The passes come flat: for each one two indices
# (empty for all) and two tensors of ends, two lengths, and whether it is causal.
_PASSES = "Tensor[] tensors, SymInt[] lengths, bool[] causal, str kernel, float scale"


def _passes(tensors: Sequence[torch.Tensor], lengths: Sequence[int], causal: Sequence[bool]) -> list[VarlenPass]:
    passes = []
    for i, is_causal in enumerate(causal):
        *indices, queries, keys = tensors[4 * i : 4 * i + 4]
        q, k = (index if len(index) else None for index in indices)
        passes.append(VarlenPass(q, k, queries, keys, lengths[2 * i], lengths[2 * i + 1], is_causal))
    return passes


@torch.library.custom_op(
    "transfusion_hf::varlen",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_PASSES}) -> (Tensor, Tensor, Tensor[])",
)
def _varlen(query, key, value, tensors, lengths, causal, kernel, scale):
    states: list[torch.Tensor] = []
    dtype = torch.promote_types(query.dtype, torch.float32)
    output: Any = None
    for one in _passes(tensors, lengths, causal):
        q, k = one.query_index, one.key_index
        part, part_lse, new = KERNELS[kernel].forward(_rows(query, q), _rows(key, k), _rows(value, k), one, scale)
        states += new
        if output is None and q is None:
            output, lse = part.to(dtype), part_lse
            continue
        if output is None:
            output = query.new_zeros(query.shape[:2] + value.shape[2:], dtype=dtype)
            lse = query.new_full(query.shape[:2], -torch.inf, dtype=dtype)
        before = _rows(lse, q)
        merged = torch.logaddexp(before, part_lse)
        part = part * (part_lse - merged).exp()[..., None]
        output[q] = _rows(output, q) * (before - merged).exp()[..., None] + part
        lse[q] = merged
    return output.to(query.dtype).contiguous(), lse.contiguous(), states


@_varlen.register_fake
def _(query, key, value, tensors, lengths, causal, kernel, scale):
    shape, dtype = query.shape[:2], torch.promote_types(query.dtype, torch.float32)
    states = [state for _ in causal for state in KERNELS[kernel].make_states(query)]
    return query.new_empty(shape + value.shape[2:]), query.new_empty(shape, dtype=dtype), states


@torch.library.custom_op(
    "transfusion_hf::varlen_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, Tensor[] states, "
    f"{_PASSES}) -> (Tensor, Tensor, Tensor)",
)
def _varlen_backward(grad, query, key, value, output, lse, states, tensors, lengths, causal, kernel, scale):
    grads: list[Any] = [None, None, None]
    backward: Any = KERNELS[kernel].backward
    passes, states = _passes(tensors, lengths, causal), list(states)
    num_states = len(states) // len(passes)
    for i, one in enumerate(passes):
        q, k = one.query_index, one.key_index
        index = (q, q, k, k, q, q)
        inputs = (_rows(x, i) for x, i in zip((grad, query, key, value, output, lse), index, strict=True))
        own = states[i * num_states : (i + 1) * num_states]
        parts = backward(*inputs, own, one, scale)
        # A whole pass comes first, if at all.
        grads = [
            part if i is None else (torch.zeros_like(x) if total is None else total).index_add_(0, i, part)
            for total, x, i, part in zip(grads, (query, key, value), (q, k, k), parts, strict=True)
        ]
    return tuple(each.contiguous() for each in grads)


@_varlen_backward.register_fake
def _(grad, query, key, value, *args):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, tensors, *ctx.others = inputs
    ctx.num_states = len(output[2])
    ctx.save_for_backward(query, key, value, *output[:2], *output[2], *tensors)


def _pull_back(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    saved, end = ctx.saved_tensors, 5 + ctx.num_states
    tensors = list(saved[end:])
    grads = _varlen_backward(grad, *saved[:5], list(saved[5:end]), tensors, *ctx.others)
    return *grads, [None] * len(tensors), None, None, None, None


_varlen.register_autograd(_pull_back, setup_context=_keep_for_backward)


def varlen_attention(query, key, value, plan: VarlenPlan, scale: float) -> torch.Tensor:
    """Queries `(num_queries, heads, dim)`, keys and values `(num_keys, kv_heads, dim)` → the shape of the queries."""
    no_index = query.new_empty(0, dtype=torch.long)
    tensors = [x for one in plan.passes for x in (one.query_index, one.key_index, one.cu_queries, one.cu_keys)]
    tensors = [no_index if x is None else x for x in tensors]
    lengths = [n for one in plan.passes for n in (one.max_queries, one.max_keys)]
    causal = [one.is_causal for one in plan.passes]
    return _varlen(query, key, value, tensors, lengths, causal, _kernel_for(query).name, scale)[0]


def transfusion_varlen_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, varlen_plan=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """
    The attention function registered as `"transfusion_varlen"`: queries `(batch, heads, seq, dim)`, keys and values
    `(batch, kv_heads, past + seq, dim)` → `(batch, seq, heads, dim)`, 0 at padding, and `None` for the weights.

    Raises:
        ValueError: no plan or one of other sizes, dropout, a sliding window, soft-capped scores, a dtype, device or
            head size that no kernel takes.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{VARLEN_ATTENTION}` computes Transfusion's mask alone, this layer has `{name}={kwargs[name]}`; use "
                "'sdpa' or 'flex_attention'."
            )
    if dropout:
        raise ValueError(f"`{VARLEN_ATTENTION}` has no dropout; got {dropout}. Set `attention_dropout` to 0.")
    batch, _, seq, dim = query.shape
    if varlen_plan is None and not getattr(module, "is_causal", True):  # a vision encoder
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return output.transpose(1, 2), None
    if varlen_plan is None:
        raise ValueError(
            f"`{VARLEN_ATTENTION}` needs the plan that `TransfusionModel` makes; elsewhere, and for decoders whose "
            "layers do not hand it on (StableLM), use 'sdpa'."
        )
    sizes, planned = (batch * seq, batch * key.shape[2]), (varlen_plan.num_queries, varlen_plan.num_keys)
    if sizes != planned:
        raise ValueError(f"`varlen_plan` is for {planned} queries and keys, not {sizes}; make it from these ids.")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32, values are in the lower precision.
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = varlen_attention(query, key, value, varlen_plan, dim**-0.5 if scaling is None else scaling)
    return output.unflatten(0, (batch, seq)), None


# Without an entry of its own the library would not let a mask pass; the plan takes its place.
AttentionInterface.register(VARLEN_ATTENTION, transfusion_varlen_attention)
AttentionMaskInterface.register(VARLEN_ATTENTION, lambda **kwargs: None)
