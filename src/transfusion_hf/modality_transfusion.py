"""
Separate weights for image positions (Mixture-of-Transformers, arXiv 2411.04996; LMFusion, arXiv 2412.15188): inside
each decoder layer a patch runs through its own projections, MLP and norms, a token of text through the decoder's.
Attention is shared. All of this acts on each position alone, so positions are sorted by modality, each half runs
through one of the two modules, and they are put together again.

The decoder's own modules keep their places and names; the image's stand beside them, `layers.0.image.mlp.up_proj` for
`layers.0.mlp.up_proj`, copies at first. No code of the families is repeated: a layer's `forward` is called with a view
of the layer whose modules are the routed ones.
"""

import copy
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

IMAGE = "image"  # the child of a decoder layer that holds the image's modules

# Families whose attention normalises queries and keys as (batch, heads, seq, dim), not (batch, seq, heads, dim).
_HEADS_FIRST = ("exaone4", "gemma3_text", "phi", "stablelm")


class ModalityRouter:
    """
    Sends each position through either the text module or the image's. Made once in a forward pass.

    Args:
        shape (`torch.Size`): `(batch, seq)`.
        is_image (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            Where a patch stands. `None`: nowhere. The image modules then see one position of zeros, times 0, so that
            they have a gradient of 0.
        num_image_rows (`int`): Number of patches: known from the images, without waiting for the device.
    """

    def __init__(self, model_type: str, shape: torch.Size, is_image: torch.BoolTensor | None, num_image_rows: int = 0):
        self.shape = shape
        self.heads_first = model_type in _HEADS_FIRST
        num_text_rows = shape.numel() - num_image_rows
        self.is_all_image = num_text_rows == 0
        self.is_all_text = is_image is None
        if is_image is not None and not self.is_all_image:
            order = is_image.flatten().int().argsort(stable=True)
            self.rows = order.split([num_text_rows, num_image_rows])
            self.inverse = order.argsort()

    def __call__(self, text: Callable, image: Callable, states: torch.Tensor) -> torch.Tensor:
        """Runs the modules on `states` of shape `(batch, seq, ...)` or `(batch, heads, seq, dim)`."""
        seq_dim = 2 if self.heads_first and states.ndim == 4 else 1
        assert (states.shape[0], states.shape[seq_dim]) == self.shape
        if self.is_all_image:
            return image(states)
        if self.is_all_text:
            return text(states) + 0.0 * image(torch.zeros_like(states[:1].narrow(seq_dim, 0, 1))).sum()
        flat = states.movedim(seq_dim, 1).flatten(0, 1)
        parts = []
        # The indices follow the states: a model may be spread over devices.
        for module, rows in zip((text, image), self.rows, strict=True):
            part = flat.index_select(0, rows.to(flat.device))[None].movedim(1, seq_dim)  # one row of as many positions
            parts.append(module(part).movedim(seq_dim, 1)[0])
        whole = torch.cat(parts).index_select(0, self.inverse.to(flat.device))
        return whole.unflatten(0, self.shape).movedim(1, seq_dim)


class _View:
    """A module as its own `forward` sees it, with some of its children replaced."""

    forward = None  # gradient checkpointing asks whether it is the outermost

    def __init__(self, module: nn.Module, children: dict[str, Callable]):
        self._module = module
        self._children = children

    def __getattr__(self, name: str) -> Any:
        return self._children[name] if name in self._children else getattr(self._module, name)


class _Routed:
    """
    Mixed into the class of a decoder layer, of its attention and, for the last norm, of the decoder. The router is an
    argument of `forward`, so gradient checkpointing keeps it for the backward pass, whenever and in whatever thread
    that runs.
    """

    plain_class: Any
    is_decoder: bool  # which hands the router on to its layers

    def __reduce_ex__(self, protocol):
        return _new_routed, (self.plain_class,), self.__dict__

    def forward(self, *args, modality_router=None, image_modules=None, **kwargs):
        if modality_router is None:
            return self.plain_class.forward(self, *args, **kwargs)
        children: dict[str, Any] = {}
        for name, image in (getattr(self, IMAGE).items if image_modules is None else image_modules)():
            own: Any = getattr(self, name)
            if isinstance(image, nn.ModuleDict):  # the attention: its own modules are routed, it is called itself
                # A method and not the modules, which accelerate would move to the device with the other arguments,
                # though their weights may be on disk.
                children[name] = partial(own, modality_router=modality_router, image_modules=image.items)
            else:
                children[name] = partial(modality_router, own, image)
        if self.is_decoder:
            kwargs["modality_router"] = modality_router
        return self.plain_class.forward(_View(self, children), *args, **kwargs)


@cache
def _routed_class(plain_class: Any) -> Any:
    # Under the same name, by which FSDP and others find the layers.
    members = {"plain_class": plain_class, "is_decoder": issubclass(plain_class, PreTrainedModel)}
    return type(plain_class.__name__, (_Routed, plain_class), members)


def _new_routed(plain_class: Any) -> nn.Module:
    """To be filled by `copy` or `pickle`."""
    routed_class = _routed_class(plain_class)
    return routed_class.__new__(routed_class)


def untie_modalities(language_model: nn.Module, final_norm: bool = False) -> None:
    """
    Gives each decoder layer a copy of its modules for image positions, used where `forward` gets a `modality_router`.
    Without one the model stays what it was, to the bit. `ValueError` if the layers have image weights already.

    With `final_norm` the norm behind the last layer gets one, too. By default it stays one for all: what follows it at
    a patch is the image's own linear layer.
    """
    for layer in language_model.layers:
        attention = layer.self_attn
        if hasattr(layer, IMAGE):
            raise ValueError("This decoder's layers have image weights already, from another model; load it again.")
        modules = {"self_attn": nn.ModuleDict(_copies(attention)), **_copies(layer, without="self_attn")}
        layer.add_module(IMAGE, nn.ModuleDict(modules))
        for part in (layer, attention):
            part.__class__ = _routed_class(part.__class__)
    if final_norm:
        name = next(name for name in ("norm", "final_layernorm") if hasattr(language_model, name))
        language_model.add_module(IMAGE, nn.ModuleDict({name: copy.deepcopy(getattr(language_model, name))}))
        language_model.__class__ = _routed_class(language_model.__class__)
    plan = language_model.tp_plan
    language_model.tp_plan = {**plan, **{image_name(name): style for name, style in plan.items()}}


def _copies(module: nn.Module, without: str | None = None) -> dict[str, nn.Module]:
    children = {name: child for name, child in module.named_children() if name != without}
    return {name: copy.deepcopy(child) for name, child in children.items() if any(True for _ in child.parameters())}


def image_name(name: str) -> str:
    """The name of the image twin, if any, of a decoder's weight or of a module in a parallel plan."""
    return re.sub(
        r"(^|\.)layers\.(\d+|\*)\.|\blanguage_model\.(?=(final_layer)?norm\.)", rf"\g<0>{IMAGE}.", name, count=1
    )


def is_of_images(name: str) -> bool:
    """Whether a parameter of this name belongs to patch encoder, patch decoder or image weights."""
    return not {"patch_encoder", "patch_decoder", IMAGE}.isdisjoint(name.split("."))


def image_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Name and parameter of each image weight of the decoder layers, and its text twin."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        head, found, tail = name.partition(f".{IMAGE}.")
        if found and (twin := parameters.get(f"{head}.{tail}")) is not None:
            yield name, parameter, twin
