"""Pixels in, pixels out: PIL images and arrays to tensors in [−1, 1], and back."""

import base64
import os
import struct
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    PILImageResampling,
    SizeDict,
    make_flat_list_of_images,
    pil_torch_interpolation_mapping,
)
from transformers.processing_utils import ImagesKwargs


def read_picture(picture: Any) -> Image.Image:
    """
    The picture of a path, a URL, a data URI, bytes, `{"bytes": ..., "path": ...}` as in `datasets`, or a PIL image:
    loaded, and upright as its EXIF data say. Raises `ValueError` where none can be read.
    """
    source = picture
    try:
        if isinstance(source, dict):
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = httpx.get(source, follow_redirects=True).raise_for_status().content
        elif isinstance(source, str) and source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2])
        if not isinstance(source, Image.Image):
            source = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        if getattr(source, "tag_v2", {}).get(262) == 6 and source.tile and source.tile[0][0] == "raw":
            source = _with_libtiff(source)
        source.load()  # notices truncated files
        return ImageOps.exif_transpose(source)
    # What Pillow raises depends on the format.
    except (
        OSError, ValueError, TypeError, AttributeError, SyntaxError, struct.error, httpx.HTTPError, httpx.InvalidURL,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        name = os.path.basename(picture) if isinstance(picture, (str, os.PathLike)) else type(picture).__name__
        raise ValueError(f"{name[:80]} is no picture that can be read: {error}") from error


def _with_libtiff(image: Any) -> Image.Image:
    """A TIFF opened again. Without libtiff, Pillow misreads uncompressed YCbCr as cut off."""
    image.fp.seek(0)
    TiffImagePlugin.READ_LIBTIFF = True
    try:
        return Image.open(image.fp)
    finally:
        TiffImagePlugin.READ_LIBTIFF = False


class TransfusionImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    Args:
        size_divisor (`int`, *optional*):
            Instead of resizing to `size` exactly: to sides that are multiples of it, the shorter one at least
            `shortest_edge` and the longer one at most `longest_edge`, which counts more, and no further.
        vision_size (`dict[str, int]`), vision_size_divisor (`int`, *optional*): The same for a vision encoder.
        read_images_as (`str` or `list[str]`, *optional*):
            `"latents"`, `"vision"`, or `"both"`, which is the default with a `vision_size`; a list has one per image.
    """

    size_divisor: int | None
    vision_size: dict[str, int] | None
    vision_size_divisor: int | None
    read_images_as: str | list[str] | None


def sides_to_resize_to(sides: tuple[int, int], size: SizeDict, divisor: int) -> tuple[int, int]:
    """Height and width, multiples of `divisor`, that [`TransfusionImagesKwargs`] describes."""
    longest = size.longest_edge // divisor * divisor if size.longest_edge else max(sides) + divisor
    scale = max(min(longest / max(sides), 1.0), size.shortest_edge / min(sides))
    scale = min(scale, longest / max(sides))
    height, width = (min(longest, max(divisor, round(side * scale / divisor) * divisor)) for side in sides)
    return height, width


class TransfusionImageProcessor(TorchvisionBackend):
    """
    Resizes, crops to the centre and maps to [−1, 1] (§4.1: 256×256). With `do_resize=False, do_center_crop=False`
    images keep their sizes, and `pixel_values` is a list if they differ. Accepts PIL images of any mode: reduces 16
    bits to 8, lays transparency over white, and converts to gray or colour, as `image_mean` has one number or three.
    Images for a vision encoder become `vision_pixel_values`. Takes what [`TransfusionImagesKwargs`] says, too.
    """

    _auto_class = "AutoImageProcessor"  # the library saves its code
    valid_kwargs = TransfusionImagesKwargs
    model_input_names = ["pixel_values"]
    size_divisor = vision_size = vision_size_divisor = read_images_as = None
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    crop_size = {"height": 256, "width": 256}
    rescale_factor = 1 / 255
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads all but arrays and tensors by [`read_picture`], in lists of any depth. The library calls it first."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        is_array = isinstance(image_url_or_urls, (np.ndarray, torch.Tensor))
        return image_url_or_urls if is_array else read_picture(image_url_or_urls)

    def process_image(self, image, do_convert_rgb: bool | None = None, do_rescale: bool | None = None, **kwargs):
        if isinstance(image, Image.Image):
            if kwargs.get("do_resize") and kwargs.get("do_center_crop") and kwargs["size"].shortest_edge:
                image = self._crop_long_side(image, kwargs["size"], kwargs["crop_size"], kwargs["resample"])
            image, do_convert_rgb = self.convert(image), False
        elif do_rescale and str(getattr(image, "dtype", "uint8")).removeprefix("torch.") != "uint8":
            raise ValueError(
                f"`images`: arrays must be uint8, 0 to 255; got {image.dtype}. Convert it, or pass PIL images, or "
                "floats in [0, 1] with `do_rescale=False`."
            )
        image = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        if kwargs.get("size_divisor"):  # then `preprocess` has the library resize nothing
            sides = sides_to_resize_to(image.shape[-2:], kwargs["size"], kwargs["size_divisor"])
            resample = pil_torch_interpolation_mapping.get(kwargs["resample"], kwargs["resample"])
            image = F.resize(image, sides, resample, antialias=True)
        return image

    def convert(self, image: Image.Image) -> Image.Image:
        """Converts an image of any mode to 8 bits, gray or RGB, without transparency."""
        if image.mode == "F":
            raise ValueError("`images`: mode 'F' (floating point) has no known range; pass images of 8 or 16 bits.")
        if image.mode.startswith("I"):  # PIL would clip 16 bits instead of scaling them
            image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.mode == "La":  # which Pillow converts to nothing else
            image = image.convert("LA")
        if {"A", "a"} & {*image.getbands()} or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if len(self.image_mean) == 1 else "RGB")

    def kinds(self, read_images_as: str | Sequence[str] | None, num_images: int) -> list[str]:
        """How each image is read. `ValueError` for unknown kinds, too few, or those that need a vision encoder."""
        kinds = read_images_as or self.read_images_as or ("latents" if self.vision_size is None else "both")
        kinds = [kinds] * num_images if isinstance(kinds, str) else list(kinds)
        allowed = ("latents",) if self.vision_size is None else ("latents", "vision", "both")
        if len(kinds) != num_images or not set(kinds) <= {*allowed}:
            raise ValueError(
                f"`read_images_as` must be one of {allowed}, or a list with one for each of {num_images} images; got "
                f"{read_images_as!r}. (Without a `vision_size`, the model has no vision encoder.)"
            )
        return kinds

    def preprocess(self, images, *args, return_tensors=None, read_images_as=None, **kwargs) -> BatchFeature:
        images = make_flat_list_of_images(self.fetch_images(images))
        kinds, features = self.kinds(read_images_as, len(images)), BatchFeature()
        vision = {"size": self.vision_size, "size_divisor": self.vision_size_divisor, "do_center_crop": False}
        for kind, name, own in (("latents", "pixel_values", {}), ("vision", "vision_pixel_values", vision)):
            chosen = [image for image, one in zip(images, kinds, strict=True) if one in (kind, "both")]
            if not chosen:
                continue
            # The library would stack images of several sizes and fail.
            options = {"do_resize": self.do_resize, "size_divisor": self.size_divisor, **kwargs, **own}
            options["size_divisor"] = options["size_divisor"] if options["do_resize"] else None
            options["do_resize"] = options["do_resize"] and not options["size_divisor"]
            values = super().preprocess(chosen, *args, return_tensors=None, **options)["pixel_values"]
            features[name] = torch.stack(list(values)) if len({x.shape for x in values}) == 1 else values
        return features

    def _crop_long_side(self, image: Image.Image, size: SizeDict, crop: SizeDict, resample: Any) -> Image.Image:
        """
        Resizes and crops an image along its long side if it would have over 16 times the pixels needed once the short
        side has its size. One of 1 × 200,000 would take 39 GB.
        """
        axis = int(image.height > image.width)  # the long one of (width, height)
        short, long = image.size[1 - axis], image.size[axis]
        edge, cropped = size.shortest_edge, (crop.width, crop.height)[axis]
        resized, kept = int(edge * long / short), max(edge, cropped)
        if resized <= 16 * kept:
            return image
        start = (resized - cropped) // 2 - (kept - cropped) // 2
        first, last = (end * long / resized for end in (start, start + kept))
        margin = 4 + 4 * long // resized  # what the filter of the outermost pixels reaches
        low, high = max(0, int(first) - margin), min(long, int(last) + margin)
        image = self.convert(image.crop((0, low, short, high) if axis else (low, 0, high, short)))
        names = {torchvision: pil for pil, torchvision in pil_torch_interpolation_mapping.items()}
        resample, span = names.get(resample, resample), (first - low, last - low)
        # Rows first, as for other images: what lies between is clipped to 8 bits.
        if axis:
            image = image.resize((edge, high - low), resample)
            return image.resize((edge, kept), resample, (0, span[0], edge, span[1]))
        return image.resize((kept, edge), resample, (span[0], 0, span[1], short))

    def postprocess(self, images: Iterable[torch.Tensor]) -> list[Image.Image]:
        """PIL images of tensors `(channels, height, width)`, in [−1, 1] but for clipping; rounds to 8 bits."""
        mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (self.image_mean, self.image_std))
        pictures = []
        for image in images:
            if image.ndim != 3 or len(image) not in (1, 3) or not torch.isfinite(image).all():
                raise ValueError(
                    "`images` must hold finite tensors of shape (channels, height, width) with 1 or 3 channels; got "
                    f"shape {tuple(image.shape)}."
                )
            pixels = image.detach().float().cpu() * std + mean
            pictures.append(F.to_pil_image((pixels.clamp(0, 1) * 255).round().to(torch.uint8)))
        return pictures
