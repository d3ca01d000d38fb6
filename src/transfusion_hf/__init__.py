"""Transfusion (Zhou et al., arXiv 2408.11039) for Hugging Face."""

# ruff: noqa: E402 - the version of transformers is checked before anything imports it

import warnings
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

NEWEST_TESTED_TRANSFORMERS = "5.24"


def _check_transformers() -> None:
    """Raises below the version required by pyproject.toml, and warns above the newest that was tested."""
    installed = Version(version("transformers"))
    requirements = map(Requirement, requires("transfusion-hf") or [])
    supported = next(r.specifier for r in requirements if r.name == "transformers")
    if not supported.contains(installed, prereleases=True):
        raise ImportError(
            f"transfusion_hf needs transformers {supported}; {installed} is installed. "
            f"Run `pip install 'transformers{supported}'`."
        )
    if installed.release[:2] > Version(NEWEST_TESTED_TRANSFORMERS).release:
        warnings.warn(
            f"transfusion_hf was tested with transformers {supported} up to {NEWEST_TESTED_TRANSFORMERS}; {installed} "
            f"is installed. If something fails, run `pip install 'transformers=={NEWEST_TESTED_TRANSFORMERS}.*'`.",
            stacklevel=2,
        )


_check_transformers()

import diffusers
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

from .attention_transfusion import varlen_kernels
from .configuration_transfusion import TransfusionConfig
from .conversion import language_model as _language_model  # noqa: F401 - attaches `from_causal_lm`
from .conversion.new_model import new_transfusion
from .data.collator import TransfusionDataCollator
from .generation_transfusion import TransfusionGenerateOutput
from .image_processing_transfusion import TransfusionImageProcessor
from .inference import StreamedImage, TransfusionPipeline, TransfusionStreamer
from .inference.pipeline import for_transfusions_only
from .kernels import set_varlen_kernel
from .modeling_transfusion import (
    SUPPORTED_TEXT_MODELS,
    TransfusionCausalLMOutputWithPast,
    TransfusionForCausalLMAndDiffusion,
    TransfusionModel,
    TransfusionPreTrainedModel,
)
from .pipelines_transfusion import (
    InterleavedGenerationPipeline,
    TextToImagePipeline,
    TransfusionAnyToAnyPipeline,
    TransfusionTextGenerationPipeline,
)
from .processing_transfusion import TransfusionProcessor, make_labels
from .training.callbacks import TransfusionEMACallback, TransfusionSamplesCallback
from .training.plans import set_trainable
from .training.trainer import TransfusionTrainer
from .vae.attach import attach_vae, measure_latent_scale, paper_vae_config

_multimodal = transformers.AutoModelForMultimodalLM
transformers.AutoConfig.register(TransfusionConfig.model_type, TransfusionConfig)
transformers.AutoModel.register(TransfusionConfig, TransfusionModel)
for _auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, _multimodal):
    _auto_class.register(TransfusionConfig, TransfusionForCausalLMAndDiffusion)
transformers.AutoProcessor.register(TransfusionConfig, TransfusionProcessor)
_image_processors = {"torchvision": TransfusionImageProcessor}
transformers.AutoImageProcessor.register(TransfusionConfig, image_processor_classes=_image_processors)
_ours = {"text-to-image": TextToImagePipeline, "interleaved-generation": InterleavedGenerationPipeline}
for _task, _class in _ours.items():
    PIPELINE_REGISTRY.register_pipeline(_task, _class, pt_model=_multimodal, type="multimodal")
_tasks = PIPELINE_REGISTRY.supported_tasks
# From these two, other models get the library's own pipelines.
_tasks["any-to-any"] = {**_tasks["any-to-any"], "impl": for_transfusions_only(TransfusionAnyToAnyPipeline)}
_writing = for_transfusions_only(TransfusionTextGenerationPipeline)
_tasks["text-generation"] = {**_tasks["text-generation"], "impl": _writing}
# Where `DiffusionPipeline.from_pretrained` looks up the class that a `model_index.json` names.
diffusers.TransfusionPipeline = TransfusionPipeline

__version__ = version("transfusion-hf")
__all__ = [
    "SUPPORTED_TEXT_MODELS", "TransfusionCausalLMOutputWithPast", "TransfusionConfig", "TransfusionDataCollator",
    "TransfusionEMACallback", "TransfusionForCausalLMAndDiffusion", "TransfusionGenerateOutput",
    "TransfusionImageProcessor", "TransfusionModel", "TransfusionPreTrainedModel", "InterleavedGenerationPipeline",
    "TextToImagePipeline", "TransfusionPipeline", "TransfusionProcessor", "TransfusionSamplesCallback",
    "TransfusionStreamer", "TransfusionTrainer", "StreamedImage", "attach_vae", "make_labels",
    "measure_latent_scale", "new_transfusion", "paper_vae_config", "set_trainable", "set_varlen_kernel",
    "varlen_kernels",
]  # fmt: skip
