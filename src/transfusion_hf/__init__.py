"""Transfusion (Zhou et al., arXiv 2408.11039) for Hugging Face."""

from importlib.metadata import requires, version

from packaging.requirements import Requirement


def _check_transformers() -> None:
    """Private methods of transformers are overridden: an untried version would fail somewhere deep, or silently."""
    requirements = [Requirement(requirement) for requirement in requires("transfusion-hf") or []]
    supported = next(r.specifier for r in requirements if r.name == "transformers")
    if not supported.contains(version("transformers"), prereleases=True):
        raise ImportError(
            f"transfusion_hf needs transformers {supported}; {version('transformers')} is installed. "
            f"Run `pip install 'transformers{supported}'`."
        )


_check_transformers()

from transformers import (  # noqa: E402 - only once the version is known to fit
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .attention_transfusion import set_varlen_kernel, varlen_kernels  # noqa: E402
from .configuration_transfusion import TransfusionConfig, paper_vae_config  # noqa: E402
from .data_collator import TransfusionDataCollator  # noqa: E402
from .generation_transfusion import TransfusionGenerateOutput  # noqa: E402
from .image_processing_transfusion import TransfusionImageProcessor  # noqa: E402
from .modeling_transfusion import (  # noqa: E402
    SUPPORTED_TEXT_MODELS,
    TransfusionCausalLMOutputWithPast,
    TransfusionForCausalLMAndDiffusion,
    TransfusionModel,
    TransfusionPreTrainedModel,
)
from .pipelines_transfusion import (  # noqa: E402
    InterleavedGenerationPipeline,
    TextToImagePipeline,
    TransfusionPipeline,
)
from .processing_transfusion import TransfusionProcessor, make_labels  # noqa: E402
from .streamers import StreamedImage, TransfusionStreamer  # noqa: E402
from .trainer import TransfusionTrainer  # noqa: E402
from .trainer_callbacks import TransfusionEMACallback, TransfusionSamplesCallback  # noqa: E402
from .training_plans import set_trainable  # noqa: E402
from .vae import attach_vae, measure_latent_scale  # noqa: E402

AutoConfig.register(TransfusionConfig.model_type, TransfusionConfig)
AutoModel.register(TransfusionConfig, TransfusionModel)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(TransfusionConfig, TransfusionForCausalLMAndDiffusion)
AutoImageProcessor.register(TransfusionConfig, image_processor_classes={"torchvision": TransfusionImageProcessor})
AutoProcessor.register(TransfusionConfig, TransfusionProcessor)

__version__ = version("transfusion-hf")
__all__ = [
    "SUPPORTED_TEXT_MODELS",
    "TransfusionCausalLMOutputWithPast",
    "TransfusionConfig",
    "TransfusionDataCollator",
    "TransfusionEMACallback",
    "TransfusionForCausalLMAndDiffusion",
    "TransfusionGenerateOutput",
    "TransfusionImageProcessor",
    "TransfusionModel",
    "TransfusionPreTrainedModel",
    "InterleavedGenerationPipeline",
    "TextToImagePipeline",
    "TransfusionPipeline",
    "TransfusionProcessor",
    "TransfusionSamplesCallback",
    "TransfusionStreamer",
    "TransfusionTrainer",
    "StreamedImage",
    "attach_vae",
    "make_labels",
    "measure_latent_scale",
    "paper_vae_config",
    "set_trainable",
    "set_varlen_kernel",
    "varlen_kernels",
]
