"""The losses of the VAE, each against a slow twin in float64, a hand-made number or the library it stands on."""

import math
import sys

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torchvision.models import resnet50, squeezenet1_1

from transfusion_hf.vae.losses import (
    IdentityLoss,
    PatchDiscriminator,
    PerceptualLoss,
    VAELoss,
    hinge_discriminator_loss,
)


class Maps(nn.Module):
    """Two feature maps, the second with positions of zero length."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.second = nn.Conv2d(5, 4, 3, stride=2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values):
        first = self.first(pixel_values)
        return [first, self.dropout(self.second(first).relu())]


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 6)

    def forward(self, pixel_values):
        return self.linear(pixel_values.flatten(1))


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


def naive_perceptual_distance(outputs, targets, weights) -> float:
    """Eq. 1 of arXiv 1801.03924, mean over the batch."""
    total = 0.0
    for output, target, weight in zip(outputs, targets, weights, strict=True):
        batch, channels, height, width = output.shape
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    pair = [[float(m[b, c, y, x]) for c in range(channels)] for m in (output, target)]
                    units = []
                    for vector in pair:
                        length = math.sqrt(sum(value**2 for value in vector))
                        units.append([value / length if length else 0.0 for value in vector])
                    distance = sum(w * (u - v) ** 2 for w, u, v in zip(weight, *units, strict=True))
                    total += distance / (batch * height * width)
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_the_perceptual_loss_is_the_sum_of_its_definition(weighted):
    network = Maps()
    weights = [torch.rand(5), torch.rand(4)] if weighted else ()
    loss = PerceptualLoss(network, weights)
    first, second = images(2, 3, 9, 9), images(2, 3, 9, 9)
    expected = naive_perceptual_distance(
        network(first), network(second), [w.tolist() for w in weights] if weighted else [[1.0] * 5, [1.0] * 4]
    )
    assert loss(first, second).item() == pytest.approx(expected, rel=1e-4)
    assert loss(first, first).item() == 0


def test_a_layer_that_is_silent_everywhere_gives_finite_gradients():
    network = Maps()
    network.first.requires_grad_(False).weight.zero_()
    network.first.bias.zero_()
    reconstruction = images(1, 3, 9, 9).requires_grad_()
    PerceptualLoss(network)(reconstruction, images(1, 3, 9, 9)).backward()
    assert reconstruction.grad.isfinite().all()


def test_feature_networks_are_frozen_and_stay_in_evaluation_mode():
    network = Maps()
    loss = VAELoss(PerceptualLoss(network), IdentityLoss(Embedding())).train()
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not network.dropout.training and not loss.identity.training


def test_only_the_reconstruction_receives_gradients_of_the_feature_losses():
    for loss in (PerceptualLoss(Maps()), IdentityLoss(Embedding())):
        reconstruction, original = (images(2, 3, 8, 8).requires_grad_() for _ in range(2))
        loss(reconstruction, original).backward()
        assert reconstruction.grad.abs().sum() > 0 and original.grad is None


def test_wrong_numbers_of_weights_and_shapes_are_refused_with_both():
    with pytest.raises(ValueError, match="has 1 entries but the network returns 2"):
        PerceptualLoss(Maps(), [torch.ones(5)])(images(1, 3, 9, 9), images(1, 3, 9, 9))
    for loss in (PerceptualLoss(Maps()), IdentityLoss(Embedding())):
        with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) but `pixel_values` \(1, 3, 8, 8\)"):
            loss(images(2, 3, 8, 8), images(1, 3, 8, 8))


def backbone_file(folder, suffix=".pth", **changes):
    """As torchvision publishes it, with random weights."""
    state = squeezenet1_1(weights=None).state_dict() | changes
    file = folder / f"squeezenet{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    return file, state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_is_what_the_lpips_package_computes(tmp_path, suffix):
    lpips = pytest.importorskip("lpips")
    file, state = backbone_file(tmp_path, suffix)
    ours = PerceptualLoss.from_lpips(file, net="squeeze")
    theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for name, value in theirs.net.state_dict().items():
        value.copy_(state["features." + name.split(".", 1)[1]])
    first, second = images(2, 3, 64, 64), images(2, 3, 64, 64)
    assert ours(first, second).item() == pytest.approx(theirs(first, second).mean().item(), rel=1e-4)
    assert ours(first, second).item() > 1e-3


def test_weights_of_another_backbone_are_refused(tmp_path):
    pytest.importorskip("lpips")
    with pytest.raises(ValueError, match="which is not a file"):
        PerceptualLoss.from_lpips(tmp_path / "none.pth")
    file, _ = backbone_file(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit: [\s\S]*Missing.*slice5.10.bias[\s\S]*Unexpected"):
        PerceptualLoss.from_lpips(file, net="alex")
    file, _ = backbone_file(tmp_path, **{"features.0.weight": torch.zeros(64, 3, 5, 5)})
    with pytest.raises(ValueError, match="do not fit"):
        PerceptualLoss.from_lpips(file, net="squeeze")
    with pytest.raises(ValueError, match="expected 'vgg'"):
        PerceptualLoss.from_lpips(file, net="resnet")


def test_without_the_lpips_package_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install lpips==0\.1\.4"):
        PerceptualLoss.from_lpips("vgg16.pth")


def test_identity_is_zero_for_equal_images_and_one_less_the_cosine_otherwise():
    embedding = Embedding()
    loss = IdentityLoss(embedding)
    first, second = images(3, 3, 8, 8), images(3, 3, 8, 8)
    assert loss(first, first).item() == pytest.approx(0, abs=1e-6)
    expected = 0.0
    for a, b in zip(embedding(first).tolist(), embedding(second).tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        expected += (1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))) / 3
    assert loss(first, second).item() == pytest.approx(expected, abs=1e-5)


def moco_file(folder, drop: str = "", prefix: str = "module.encoder_q."):
    """The layout of the authors' checkpoint: two encoders with projection heads, a queue, an optimizer's state."""
    network = resnet50(weights=None)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):  # so that a test can tell it from the initial one
            buffer.uniform_(0.5, 1.5)
    state = {}
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            state[prefix + name] = value
            state["module.encoder_k." + name] = torch.zeros_like(value)
    state |= {prefix + "fc.0.weight": torch.zeros(8, 8), "module.queue": torch.zeros(128, 8)}
    state.pop(prefix + drop, None)
    file = folder / "moco_v2.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}, file)
    network.fc = nn.Identity()
    return file, network.eval()


def test_the_query_encoder_of_a_moco_checkpoint_is_loaded(tmp_path):
    file, network = moco_file(tmp_path)
    loss = IdentityLoss.from_moco(file)
    pixel_values = images(1, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = ((pixel_values + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    embedding = loss.network(pixel_values)
    assert embedding.shape == (1, 2048) and embedding.std() > 0.01
    torch.testing.assert_close(embedding, network(normalized))
    assert loss(images(1, 3, 64, 64), images(1, 3, 64, 64)).item() > 0  # any size


def test_what_is_no_moco_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which is not a file"):
        IdentityLoss.from_moco(tmp_path / "none.pth")
    file, _ = moco_file(tmp_path, drop="layer1.0.conv1.weight")
    with pytest.raises(ValueError, match=r"do not fit: [\s\S]*layer1.0.conv1.weight"):
        IdentityLoss.from_moco(file)
    file, _ = moco_file(tmp_path, prefix="module.base_encoder.")
    with pytest.raises(ValueError, match=r"expected keys like 'module\.encoder_q\.conv1\.weight'"):
        IdentityLoss.from_moco(file)


def test_the_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    # real: 0, 0.5, 2; fake: 0, 1.25
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(2.5 / 3 + 1.25 / 2)


@pytest.mark.parametrize(("num_layers", "size", "patches"), [(1, 16, 6), (2, 32, 6), (3, 256, 30)])
def test_the_discriminator_gives_a_logit_a_patch(num_layers, size, patches):
    discriminator = PatchDiscriminator(in_channels=2, hidden_channels=4, num_layers=num_layers)
    assert discriminator(images(2, 2, size, size)).shape == (2, 1, patches, patches)
    smallest = images(1, 2, discriminator.min_size, discriminator.min_size)
    assert discriminator(smallest).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="fewer `num_layers`"):
        discriminator(smallest[..., 1:])


def test_a_patch_of_the_default_discriminator_is_70_pixels_large():
    discriminator = PatchDiscriminator(hidden_channels=4)
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda hidden_states: hidden_states  # it sees the whole image, faintly
    pixel_values = images(1, 3, 256, 256).requires_grad_()
    discriminator(pixel_values)[0, 0, 15, 15].backward()
    seen = pixel_values.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70]


def parts():
    loss = VAELoss(PerceptualLoss(Maps()), IdentityLoss(Embedding()), gan_start=10)
    decoder = nn.Conv2d(3, 3, 1)
    discriminator = PatchDiscriminator(3, hidden_channels=4, num_layers=1)
    pixel_values = images(2, 3, 8, 8)
    return loss, decoder, discriminator, pixel_values


def test_the_total_is_the_papers_weighted_sum():
    loss, decoder, discriminator, pixel_values = parts()
    reconstruction, kl = decoder(pixel_values), torch.tensor(2e5)
    total, terms = loss(reconstruction, pixel_values, kl, 10, discriminator)
    expected = {
        "l1": (reconstruction - pixel_values).abs().mean(),
        "perceptual": loss.perceptual(reconstruction, pixel_values),
        "gan": -discriminator(reconstruction).mean(),
        "identity": loss.identity(reconstruction, pixel_values),
        "regularizer": kl,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), abs=1e-6), name
    sum_by_hand = sum(
        weight * expected[name].item()
        for name, weight in (("l1", 1), ("perceptual", 1), ("gan", 0.5), ("identity", 0.2), ("regularizer", 1e-6))
    )
    assert total.item() == pytest.approx(sum_by_hand, abs=1e-6)
    assert VAELoss(loss.perceptual, loss.identity).gan_start == 50_000


def test_the_adversarial_term_is_off_before_its_step_and_with_weight_zero():
    loss, decoder, discriminator, pixel_values = parts()
    discriminator.forward = None  # calling it would raise
    _, terms = loss(decoder(pixel_values), pixel_values, torch.zeros(()), 9, discriminator)
    assert "gan" not in terms and not loss.gan_is_on(9) and loss.gan_is_on(10)
    without = VAELoss(None, None, perceptual_weight=0, identity_weight=0, gan_weight=0, gan_start=0)
    _, terms = without(decoder(pixel_values), pixel_values, torch.zeros(()), 99, discriminator)
    assert terms.keys() == {"l1", "regularizer"}


def test_neither_side_receives_the_others_gradients():
    loss, decoder, discriminator, pixel_values = parts()
    total, _ = loss(decoder(pixel_values), pixel_values, torch.zeros(()), 10, discriminator)
    total.backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert all(parameter.grad is None for parameter in discriminator.parameters())

    decoder.zero_grad()
    loss.discriminator_loss(discriminator, decoder(pixel_values), pixel_values).backward()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_the_adversarial_term_reaches_the_decoder():
    _, decoder, discriminator, pixel_values = parts()
    loss = VAELoss(None, None, l1_weight=0, perceptual_weight=0, identity_weight=0, gan_start=0)
    total, _ = loss(decoder(pixel_values), pixel_values, torch.zeros(()), 0, discriminator)
    (expected,) = torch.autograd.grad(-0.5 * discriminator(decoder(pixel_values)).mean(), decoder.weight)
    total.backward()
    torch.testing.assert_close(decoder.weight.grad, expected)
    assert expected.abs().sum() > 0


def test_the_discriminators_loss_tells_originals_from_reconstructions():
    loss, decoder, discriminator, pixel_values = parts()
    reconstruction = decoder(pixel_values)
    expected = hinge_discriminator_loss(discriminator(pixel_values), discriminator(reconstruction))
    torch.testing.assert_close(loss.discriminator_loss(discriminator, reconstruction, pixel_values), expected)


def test_weights_without_a_network_and_negative_ones_are_refused():
    with pytest.raises(ValueError, match=r"`perceptual_weight` is 1\.0 but `perceptual` is None"):
        VAELoss(None, None)
    with pytest.raises(ValueError, match="`gan_weight` is -1; expected 0 or more"):
        VAELoss(None, None, perceptual_weight=0, identity_weight=0, gan_weight=-1)
