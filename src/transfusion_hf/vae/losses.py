"""
The losses that the paper's image tokenizer is trained with (§4.1, arXiv 2408.11039):

    L = L1 + LPIPS + 0.5 · GAN + 0.2 · ID + 1e-6 · KL

Images are float tensors of shape `(batch, channels, height, width)` in [-1, 1]; a reconstruction may leave that range.
Every loss is a float32 scalar, the mean over the batch. The paper gives weights only; what it leaves open is said
where it is decided.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import functional_call
from torchvision.models import resnet50


class PatchDiscriminator(nn.Module):
    r"""
    Tells real patches from reconstructed ones: a stack of 4×4 convolutions whose every output sees one patch of the
    image (PatchGAN, Isola et al., arXiv 1611.07004; 70×70 pixels with three strided layers).

    NOTE: differs from the original: groups are normalised instead of the batch, so that an image's logits depend
    neither on its neighbours nor on the number of processes.

    Args:
        in_channels (`int`, defaults to 3): Channels of the image.
        hidden_channels (`int`, defaults to 64): Channels of the first layer; each has twice the last one's, up to 8×.
        num_layers (`int`, defaults to 3): Layers of stride 2.

    Raises:
        ValueError: if the image is too small for that many layers.
    """

    def __init__(self, in_channels: int = 3, hidden_channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.min_size = 3 * 2**num_layers
        widths = [hidden_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, width in enumerate(widths[1:], start=1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], width, 4, stride, 1, bias=False),
                nn.GroupNorm(gcd(32, width), width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`): Images in [-1, 1].

        Returns:
            `torch.FloatTensor` of shape `(batch, 1, rows, columns)`: a logit per patch, large for real ones.
        """
        if min(pixel_values.shape[-2:]) < self.min_size:
            raise ValueError(
                f"`pixel_values` is {tuple(pixel_values.shape[-2:])} pixels large but this discriminator needs at "
                f"least {self.min_size} each way; build it with fewer `num_layers`."
            )
        return self.layers(pixel_values)


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    r"""
    E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))] (Lim & Ye, arXiv 1705.02894).

    Args:
        real_logits, fake_logits (`torch.FloatTensor` of any shape): Logits of real and of reconstructed patches.

    Returns:
        `torch.FloatTensor`: a scalar.
    """
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    r"""
    −E[D(x̂)], the generator's side of [`hinge_discriminator_loss`].

    Args:
        fake_logits (`torch.FloatTensor` of any shape): Logits of reconstructed patches.

    Returns:
        `torch.FloatTensor`: a scalar.
    """
    return -fake_logits.float().mean()


class _FrozenLoss(nn.Module):
    """Owns a network that measures and never learns: frozen in place, and in evaluation mode for good."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "_FrozenLoss":
        return super().train(False)


class PerceptualLoss(_FrozenLoss):
    r"""
    Distance of deep features (Zhang et al., Eq. 1, arXiv 1801.03924): at every layer the channel vectors are scaled to
    unit length, their squared differences weighted and summed over channels, averaged over positions; layers are
    summed. [`PerceptualLoss.from_lpips`] gives LPIPS proper.

    Args:
        network (`nn.Module`): Takes images in [-1, 1] and returns a sequence of feature maps
            `(batch, channels, height, width)`. It is frozen in place.
        channel_weights (`Sequence[torch.FloatTensor]`, *optional*): For each layer a weight per channel, of shape
            `(channels,)`; all 1 by default.
    """

    def __init__(self, network: nn.Module, channel_weights: Sequence[torch.Tensor] | None = None):
        super().__init__(network)
        self.num_weights = None if channel_weights is None else len(channel_weights)
        for i, weight in enumerate(channel_weights or ()):
            self.register_buffer(f"weight_{i}", weight.detach().clone())

    @classmethod
    def from_lpips(cls, backbone_weights: str | Path, net: str = "vgg") -> "PerceptualLoss":
        r"""
        LPIPS 0.1 with the calibrated weights of the `lpips` package. Nothing is downloaded.

        Args:
            backbone_weights (`str` or `Path`): The backbone's ImageNet weights as torchvision publishes them
                (`vgg16-397923af.pth`), `.pth` or `.safetensors`.
            net (`str`, defaults to `"vgg"`): `"vgg"`, the choice for training, `"alex"` or `"squeeze"`.

        Raises:
            ImportError: without the `lpips` package.
            ValueError: for another `net`, or a file that is missing or holds other weights.
        """
        try:
            import lpips
        except ImportError as error:
            raise ImportError("LPIPS needs the `lpips` package; run `pip install lpips==0.1.4`.") from error
        if net not in ("vgg", "alex", "squeeze"):
            raise ValueError(f"`net` is {net!r}; expected 'vgg', 'alex' or 'squeeze'.")
        state = _read_weights(backbone_weights, "backbone_weights")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package asks torchvision by an old argument
            module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # The package cuts torchvision's `features` into slices; layers keep their numbers.
        names = {f"features.{name.split('.', 1)[1]}": name for name in module.net.state_dict()}
        state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
        if names.keys() != state.keys():
            missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
            raise ValueError(
                f"`backbone_weights` ({backbone_weights}) is not torchvision's weights for net={net!r}: missing "
                f"{missing[:4]}, unexpected {unexpected[:4]}."
            )
        _load_strictly(module.net, {names[name]: value for name, value in state.items()}, backbone_weights)
        weights = [layer.model[-1].weight.flatten() for layer in module.lins]
        return cls(_LPIPSFeatures(module.scaling_layer, module.net), weights)

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Receives gradients.
            pixel_values (`torch.FloatTensor` of the same shape): The originals in [-1, 1]; receives none.

        Returns:
            `torch.FloatTensor`: a scalar ≥ 0.
        """
        _check_shapes(reconstruction, pixel_values)
        with torch.no_grad():
            targets = self.network(pixel_values)
        outputs = self.network(reconstruction)
        if self.num_weights not in (None, len(outputs)):
            raise ValueError(
                f"`channel_weights` has {self.num_weights} entries but the network returns {len(outputs)} feature "
                "maps; pass one for each."
            )
        loss = reconstruction.new_zeros((), dtype=torch.float32)
        for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
            difference = (_unit(output.float()) - _unit(target.float())).square()  # (batch, channels, height, width)
            if self.num_weights is not None:
                difference = difference * getattr(self, f"weight_{i}")[:, None, None]
            loss = loss + difference.sum(dim=1).mean()
        return loss


class IdentityLoss(_FrozenLoss):
    r"""
    1 − cosine similarity of the embeddings of reconstruction and original: whether the same thing is still seen. The
    paper takes the features of MoCo v2 and says no more; see [`IdentityLoss.from_moco`].

    Args:
        network (`nn.Module`): Takes images in [-1, 1] and returns embeddings `(batch, features)`. It is frozen in
            place.
    """

    @classmethod
    def from_moco(cls, checkpoint: str | Path) -> "IdentityLoss":
        r"""
        The features of MoCo v2 (Chen et al., arXiv 2003.04297): torchvision's ResNet-50 up to its pooling, 2,048
        numbers an image, on images of 224×224 normalised as in ImageNet.

        Args:
            checkpoint (`str` or `Path`): As the authors publish it (`moco_v2_800ep_pretrain.pth.tar`): its query
                encoder is taken, the projection head, the key encoder and the queue are left out.

        Raises:
            ValueError: for a file that is missing or is no such checkpoint.
        """
        state, prefix = _read_weights(checkpoint, "checkpoint"), "module.encoder_q."
        encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not encoder:
            raise ValueError(
                f"`checkpoint` ({checkpoint}) is not from MoCo: expected keys like '{prefix}conv1.weight', got "
                f"{sorted(state)[:3]}."
            )
        # `fc` is the projection head; torchvision's network does without one here.
        encoder = {name: value for name, value in encoder.items() if not name.startswith("fc.")}
        network = resnet50(weights=None)
        network.fc = nn.Identity()
        _load_strictly(network, encoder, checkpoint)
        return cls(_MoCoEmbedding(network))

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Receives gradients.
            pixel_values (`torch.FloatTensor` of the same shape): The originals in [-1, 1]; receives none.

        Returns:
            `torch.FloatTensor`: a scalar in [0, 2].
        """
        _check_shapes(reconstruction, pixel_values)
        with torch.no_grad():
            target = self.network(pixel_values)
        return 1 - F.cosine_similarity(self.network(reconstruction).float(), target.float(), dim=-1).mean()


class VAELoss(nn.Module):
    r"""
    The autoencoder's side of the training, and the discriminator's (§4.1, arXiv 2408.11039). For the discrete twin
    the commitment loss stands in the KL's place, with a weight of 1 and the paper's β inside.

    NOTE: the paper leaves open what is summed and what averaged. Here L1 is the mean over pixels and channels, so that
    it is of the size of the other terms; the KL is summed over the latent and averaged over images, because a mean
    over the latent, times 1e-6, would hold nothing.

    Args:
        perceptual (`nn.Module`, *optional*): A [`PerceptualLoss`]; may be `None` where its weight is 0.
        identity (`nn.Module`, *optional*): An [`IdentityLoss`]; may be `None` where its weight is 0.
        l1_weight, perceptual_weight, gan_weight, identity_weight (`float`, default to 1.0, 1.0, 0.5, 0.2):
            Weights; a term of weight 0 is not computed. The GAN's is constant, as in the paper, and not adapted to the
            gradients.
        regularizer_weight (`float`, defaults to 1e-6): Weight of the KL, or of the commitment loss: pass 1.0 there.
        gan_start (`int`, defaults to 50000): The first step, counted from 0, with the adversarial term.

    Raises:
        ValueError: for a negative weight, or a weight without its network.
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
        self.weights = {
            "l1": l1_weight,
            "perceptual": perceptual_weight,
            "gan": gan_weight,
            "identity": identity_weight,
            "regularizer": regularizer_weight,
        }
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"`{name}_weight` is {weight}; expected 0 or more.")
        for name, network in (("perceptual", perceptual), ("identity", identity)):
            if network is None and self.weights[name] > 0:
                raise ValueError(
                    f"`{name}_weight` is {self.weights[name]} but `{name}` is None; pass the loss, or a weight of 0."
                )
        self.perceptual = perceptual
        self.identity = identity
        self.gan_start = gan_start

    def gan_is_on(self, step: int) -> bool:
        """Whether the adversarial term counts in this step, counted from 0; the discriminator learns only then."""
        return self.weights["gan"] > 0 and step >= self.gan_start

    def forward(
        self,
        reconstruction: torch.Tensor,
        pixel_values: torch.Tensor,
        regularizer: torch.Tensor,
        step: int,
        discriminator: nn.Module,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        Args:
            reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Receives gradients.
            pixel_values (`torch.FloatTensor` of the same shape): The originals in [-1, 1].
            regularizer (`torch.FloatTensor`): A scalar: the KL, summed over the latent, mean over images; or the
                commitment loss.
            step (`int`): Training step, counted from 0.
            discriminator (`nn.Module`): A [`PatchDiscriminator`], without any wrapper of distributed training: its
                parameters receive no gradient here. Called only where [`~VAELoss.gan_is_on`].

        Returns:
            `tuple`: the total to differentiate, and every term, unweighted and detached, by name.
        """
        _check_shapes(reconstruction, pixel_values)
        terms = {"l1": F.l1_loss(reconstruction.float(), pixel_values.float()), "regularizer": regularizer.float()}
        if self.perceptual is not None and self.weights["perceptual"] > 0:
            terms["perceptual"] = self.perceptual(reconstruction, pixel_values)
        if self.identity is not None and self.weights["identity"] > 0:
            terms["identity"] = self.identity(reconstruction, pixel_values)
        if self.gan_is_on(step):
            frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
            terms["gan"] = hinge_generator_loss(functional_call(discriminator, frozen, (reconstruction,)))
        total = sum((self.weights[name] * term for name, term in terms.items()), start=torch.zeros(()).to(regularizer))
        return total, {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(
        self,
        discriminator: Callable[[torch.Tensor], torch.Tensor],
        reconstruction: torch.Tensor,
        pixel_values: torch.Tensor,
    ) -> torch.Tensor:
        r"""
        The hinge loss of the discriminator, in one pass over originals and reconstructions.

        Args:
            discriminator (`nn.Module`): With the wrapper of distributed training, which must see the pass.
            reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Receives no gradient.
            pixel_values (`torch.FloatTensor` of the same shape): The originals in [-1, 1].

        Returns:
            `torch.FloatTensor`: a scalar ≥ 0.
        """
        _check_shapes(reconstruction, pixel_values)
        logits = discriminator(torch.cat([pixel_values, reconstruction.detach().to(pixel_values.dtype)]))
        return hinge_discriminator_loss(*logits.chunk(2))


class _LPIPSFeatures(nn.Module):
    def __init__(self, scaling_layer: nn.Module, network: nn.Module):
        super().__init__()
        self.scaling_layer = scaling_layer
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.network(self.scaling_layer(pixel_values))


class _MoCoEmbedding(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[-2:] != (224, 224):
            pixel_values = F.interpolate(pixel_values, (224, 224), mode="bilinear", antialias=True)
        return self.network((pixel_values / 2 + 0.5 - self.mean) / self.std)  # (batch, 2048)


def _unit(features: torch.Tensor) -> torch.Tensor:
    # Inside the root, so that the gradient at features of zero length is finite.
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


def _check_shapes(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> None:
    if reconstruction.shape != pixel_values.shape:
        raise ValueError(
            f"`reconstruction` has shape {tuple(reconstruction.shape)} but `pixel_values` "
            f"{tuple(pixel_values.shape)}; pass the reconstruction of these images."
        )


def _read_weights(path: str | Path, argument: str) -> dict[str, torch.Tensor]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{argument}` is {path}, which is not a file.")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _load_strictly(network: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"The weights of {path} do not fit: {error}") from error


__all__ = [
    "IdentityLoss",
    "PatchDiscriminator",
    "PerceptualLoss",
    "VAELoss",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
]
