"""
The losses that the paper trains its image tokenizer with (§4.1, arXiv 2408.11039):

    L = L1 + LPIPS + 0.5 · GAN + 0.2 · ID + 1e-6 · KL

Images are float tensors of shape `(batch, channels, height, width)` in [-1, 1]; a reconstruction may leave that range.
Every loss is a float32 scalar, the mean over the batch.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torchvision.models import resnet50
from torchvision.transforms import Normalize, Resize


class PatchDiscriminator(nn.Module):
    """
    PatchGAN (Isola et al., arXiv 1611.07004): 4×4 convolutions that give a logit for every patch, of 70×70 pixels with
    the default `num_layers=3` of stride 2; each layer doubles `hidden_channels`, up to 8×.

    NOTE: differs from the original: normalises groups, so that logits depend on no other image or process.
    """

    def __init__(self, in_channels: int = 3, hidden_channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.min_size = 3 * 2**num_layers
        widths = [hidden_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, width in enumerate(widths[1:], start=1):
            stride = 2 if i < num_layers else 1
            layers += [nn.Conv2d(widths[i - 1], width, 4, stride, 1, bias=False)]
            layers += [nn.GroupNorm(gcd(32, width), width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits `(batch, 1, rows, columns)`, high for real patches; `ValueError` for images that are too small."""
        if min(size := tuple(pixel_values.shape[-2:])) < self.min_size:
            needed = f"needs at least {self.min_size} each way; build it with fewer `num_layers`"
            raise ValueError(f"`pixel_values` is {size} pixels large but this discriminator {needed}.")
        return self.layers(pixel_values)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))] of logits of any shape (Lim & Ye, arXiv 1705.02894)."""
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


class _FrozenLoss(nn.Module):
    """Compares the outputs of a network, which it freezes in evaluation mode."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "_FrozenLoss":
        return super().train(False)

    def _outputs(self, reconstruction: Tensor, pixel_values: Tensor) -> tuple:
        """What the network makes of both; only the first receives gradients."""
        if reconstruction.shape != pixel_values.shape:
            shapes = f"{tuple(reconstruction.shape)} but `pixel_values` {tuple(pixel_values.shape)}"
            raise ValueError(f"`reconstruction` has shape {shapes}; pass the reconstruction of these images.")
        with torch.no_grad():
            targets = self.network(pixel_values)
        return self.network(reconstruction), targets


class PerceptualLoss(_FrozenLoss):
    """
    Distance of deep features (Zhang et al., Eq. 1, arXiv 1801.03924): in every layer, the weighted squared difference
    of the channel vectors, each scaled to unit length, averaged over positions; summed over layers. `network` returns
    feature maps `(batch, channels, height, width)`; `channel_weights` a weight per channel of each map, 1 if empty.
    """

    def __init__(self, network: nn.Module, channel_weights: Sequence[Tensor] = ()):
        super().__init__(network)
        self.channel_weights = nn.ParameterList(w.detach().clone() for w in channel_weights).requires_grad_(False)

    @classmethod
    def from_lpips(cls, backbone_weights: str | Path, net: str = "vgg") -> "PerceptualLoss":
        """
        LPIPS 0.1, calibrated by the `lpips` package (else an `ImportError`), without downloads. `backbone_weights` are
        torchvision's ImageNet weights (`vgg16-397923af.pth`), `.pth` or `.safetensors`, of `net`: `"vgg"`, the choice
        for training, `"alex"` or `"squeeze"`. A `ValueError` says that a file is missing or does not fit.
        """
        try:
            import lpips
        except ImportError as error:
            raise ImportError("LPIPS needs the `lpips` package; run `pip install lpips==0.1.4`.") from error
        if net not in ("vgg", "alex", "squeeze"):
            raise ValueError(f"`net` is {net!r}; expected 'vgg', 'alex' or 'squeeze'.")
        state = _read_weights(backbone_weights, "backbone_weights")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package calls torchvision with a deprecated argument
            module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # The package cuts torchvision's `features` into slices; layers keep their numbers.
        names = {f"features.{name.split('.', 1)[1]}": name for name in module.net.state_dict()}
        state = {names.get(key, key): value for key, value in state.items() if not key.startswith("classifier.")}
        _load_strictly(module.net, state, backbone_weights)
        weights = [layer.model[-1].weight.flatten() for layer in module.lins]
        return cls(nn.Sequential(module.scaling_layer, module.net), weights)

    def forward(self, reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
        """A scalar ≥ 0 of two `(batch, channels, height, width)`; gradients reach the first only."""
        outputs, targets = self._outputs(reconstruction, pixel_values)
        weights = list(self.channel_weights) or [outputs[0].new_ones(())] * len(outputs)
        if len(weights) != len(outputs):
            counts = f"{len(weights)} entries but the network returns {len(outputs)} feature maps"
            raise ValueError(f"`channel_weights` has {counts}; pass one for each.")
        loss = reconstruction.new_zeros((), dtype=torch.float32)
        for output, target, weight in zip(outputs, targets, weights, strict=True):
            difference = (_unit(output.float()) - _unit(target.float())).square()  # (batch, channels, height, width)
            loss = loss + (difference * weight.reshape(-1, 1, 1)).sum(dim=1).mean()
        return loss


class IdentityLoss(_FrozenLoss):
    """1 − cosine similarity of the embeddings `(batch, features)` that `network` makes of the images."""

    @classmethod
    def from_moco(cls, checkpoint: str | Path) -> "IdentityLoss":
        """
        The 2,048 features of MoCo v2 (Chen et al., arXiv 2003.04297), which the paper names without details: from
        ResNet-50 up to its pooling, on 224×224 pixels, normalised as for ImageNet. `checkpoint` is the authors'
        `moco_v2_800ep_pretrain.pth.tar`; a `ValueError` says that it is missing or another file.
        """
        state, prefix = _read_weights(checkpoint, "checkpoint"), "module.encoder_q."
        encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not encoder:
            keys = f"expected keys like '{prefix}conv1.weight', got {sorted(state)[:3]}"
            raise ValueError(f"`checkpoint` ({checkpoint}) is not from MoCo: {keys}.")
        network = resnet50(weights=None)
        network.fc = nn.Identity()  # MoCo's `fc` is the projection head
        encoder = {name: value for name, value in encoder.items() if not name.startswith("fc.")}
        _load_strictly(network, encoder, checkpoint)
        to_unit_range = Normalize([-1.0] * 3, [2.0] * 3)
        of_imagenet = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return cls(nn.Sequential(Resize([224, 224], antialias=True), to_unit_range, of_imagenet, network))

    def forward(self, reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
        """A scalar in [0, 2] of two `(batch, channels, height, width)`; gradients reach the first only."""
        embeddings, targets = self._outputs(reconstruction, pixel_values)
        return 1 - F.cosine_similarity(embeddings.float(), targets.float(), dim=-1).mean()


class VAELoss(nn.Module):
    """
    Both sides of the training of an autoencoder: its own loss and the discriminator's (§4.1, arXiv 2408.11039). For
    the discrete twin the commitment loss takes the place of the KL, with a weight of 1 and the paper's β inside.

    NOTE: the paper does not say what is averaged. Here L1 is the mean over pixels and channels, as large as the other
    terms; the KL is summed over the latent and averaged over images: its mean, times 1e-6, would have no effect.

    Args:
        perceptual, identity (`nn.Module`, *optional*): May be `None` if their weight is 0.
        l1_weight, perceptual_weight, gan_weight, identity_weight, regularizer_weight (`float`):
            Constant; a term of weight 0 is not computed. The last is that of the KL or commitment loss. `ValueError`
            for a negative weight, or one above 0 without its network.
        gan_start (`int`, defaults to 50000): The first step, counted from 0, with the adversarial term.
    """

    def __init__(
        self,
        perceptual: nn.Module | None,
        identity: nn.Module | None,
        l1_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        gan_weight: float = 0.5,
        identity_weight: float = 0.2,
        regularizer_weight: float = 1e-6,
        gan_start: int = 50_000,
    ):
        super().__init__()
        self.weights = {"l1": l1_weight, "perceptual": perceptual_weight, "gan": gan_weight}
        self.weights |= {"identity": identity_weight, "regularizer": regularizer_weight}
        networks = {"perceptual": perceptual, "identity": identity}
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"`{name}_weight` is {weight}; expected 0 or more.")
            if weight > 0 and networks.get(name, self) is None:
                raise ValueError(f"`{name}_weight` is {weight} but `{name}` is None; pass the loss, or a weight of 0.")
        self.perceptual, self.identity, self.gan_start = perceptual, identity, gan_start

    def gan_is_on(self, step: int) -> bool:
        """Whether step `step`, counted from 0, has the adversarial term; the discriminator learns only then."""
        return self.weights["gan"] > 0 and step >= self.gan_start

    def forward(
        self, reconstruction: Tensor, pixel_values: Tensor, regularizer: Tensor, step: int, discriminator: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        The total to differentiate, and every term by name, unweighted and detached. Gradients reach `reconstruction`,
        of the shape of `pixel_values`, and `regularizer`, a scalar: the KL, mean over images, or the commitment loss.
        `discriminator` comes without a wrapper for distributed training, and is called only if `gan_is_on(step)`.
        """
        terms = {"l1": F.l1_loss(reconstruction.float(), pixel_values.float()), "regularizer": regularizer.float()}
        for name in ("perceptual", "identity"):
            if self.weights[name] > 0:
                terms[name] = getattr(self, name)(reconstruction, pixel_values)
        if self.gan_is_on(step):
            frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
            terms["gan"] = -functional_call(discriminator, frozen, (reconstruction,)).float().mean()
        total = sum((self.weights[name] * term for name, term in terms.items()), start=torch.zeros(()).to(regularizer))
        return total, {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(
        self, discriminator: Callable[[Tensor], Tensor], reconstruction: Tensor, pixel_values: Tensor
    ) -> Tensor:
        """The hinge loss in one pass over both; `discriminator` keeps its wrapper for distributed training."""
        logits = discriminator(torch.cat([pixel_values, reconstruction.detach().to(pixel_values.dtype)]))
        return hinge_discriminator_loss(*logits.chunk(2))


def _unit(features: Tensor) -> Tensor:
    # Inside the root, so that the gradient of a zero vector is finite; the `lpips` package gives NaN there.
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


def _read_weights(path: str | Path, argument: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"`{argument}` is {path}, which is not a file.")
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"The weights of {path} do not fit: {error}") from error
