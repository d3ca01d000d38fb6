"""Transfusion (Zhou et al., arXiv 2408.11039) for Hugging Face."""

import warnings
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

NEWEST_TESTED_TRANSFORMERS = "5.24"


def _check_transformers() -> None:
    """The lowest version stands in pyproject.toml. A newer one than was tested may work: it is a warning only."""
    installed = Version(version("transformers"))
    requirements = [Requirement(requirement) for requirement in requires("transfusion-hf") or []]
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

from transformers import (  # noqa: E402 - only once the version is known to fit
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from .attention_transfusion import set_varlen_kernel, varlen_kernels  # noqa: E402
from .cli.streamers import StreamedImage, TransfusionStreamer  # noqa: E402
from .configuration_transfusion import TransfusionConfig, paper_vae_config  # noqa: E402
from .conversion import language_model as _language_model  # noqa: E402, F401 - attaches `from_causal_lm`
from .data.collator import TransfusionDataCollator  # noqa: E402
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
    TransfusionAnyToAnyPipeline,
    TransfusionPipeline,
    TransfusionTextGenerationPipeline,
)
from .processing_transfusion import TransfusionProcessor, make_labels  # noqa: E402
from .training.callbacks import TransfusionEMACallback, TransfusionSamplesCallback  # noqa: E402
from .training.plans import set_trainable  # noqa: E402
from .training.trainer import TransfusionTrainer  # noqa: E402
from .vae.attach import attach_vae, measure_latent_scale  # noqa: E402

AutoConfig.register(TransfusionConfig.model_type, TransfusionConfig)
AutoModel.register(TransfusionConfig, TransfusionModel)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(TransfusionConfig, TransfusionForCausalLMAndDiffusion)
AutoImageProcessor.register(TransfusionConfig, image_processor_classes={"torchvision": TransfusionImageProcessor})
AutoProcessor.register(TransfusionConfig, TransfusionProcessor)
for _task, _class in (
    ("text-to-image", TextToImagePipeline),
    ("interleaved-generation", InterleavedGenerationPipeline),
):
    PIPELINE_REGISTRY.register_pipeline(
        _task, pipeline_class=_class, pt_model=AutoModelForMultimodalLM, type="multimodal"
    )
# Other models get the library's own pipelines from these two.
for _task, _class in (
    ("any-to-any", TransfusionAnyToAnyPipeline),
    ("text-generation", TransfusionTextGenerationPipeline),
):
    PIPELINE_REGISTRY.supported_tasks[_task] = {**PIPELINE_REGISTRY.supported_tasks[_task], "impl": _class}

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
