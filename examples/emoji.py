"""
Trains a Transfusion of 5.3M parameters from scratch on Noto's emoji (`emoji_data.py`): it draws their names, reads
pictures, and continues a document that mixes both.

    OMP_NUM_THREADS=2 python examples/emoji.py --resume_from_checkpoint true    # again: goes on
    python examples/judge_emoji.py outputs/emoji

Two cores that multiply in bfloat16 (`--bf16 true --use_cpu true`) make five steps a second.

It takes all arguments of transformers' `TrainingArguments`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import SmallTrainingArguments, ema_callbacks, say_next, with_special_tokens
from emoji_data import CATEGORIES, PACKAGES, PHRASES, Emoji, load_emoji, load_picture, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, LlamaConfig, PreTrainedTokenizerFast, set_seed

from transfusion_hf import TransfusionDataCollator, TransfusionTrainer, new_transfusion
from transfusion_hf.training.checkpoints import resume_from


@dataclass
class Arguments(SmallTrainingArguments):
    output_dir: str | None = "outputs/emoji"
    learning_rate: float = 2e-3
    per_device_train_batch_size: int = 16
    warmup_steps: float = 200
    max_steps: int = 15_000
    save_steps: float = 500
    save_total_limit: int | None = 1
    image_size: int = field(default=32, metadata={"help": "Pixels of a side: 32, or 64."})
    hidden_size: int = 256
    num_hidden_layers: int = 6
    patch_size: int = field(default=8, metadata={"help": "Pixels of a side, at 32; it grows with `image_size`."})
    prediction_type: str = "sample"
    patch_encoder: str = "linear"
    diffusion_loss_weight: float = field(default=50.0, metadata={"help": "λ."})
    train_timestep_shift: float = field(default=1.0, metadata={"help": "Above 1: more noise in training."})
    ema_decay: float = 0.999
    max_length: int = field(default=320, metadata={"help": "Of rows into which documents are packed."})
    story_share: float = field(default=0.2, metadata={"help": "Share of documents with several pictures."})
    categories: list[str] = field(default_factory=lambda: list(CATEGORIES))
    packages: str = field(default=str(PACKAGES), metadata={"help": "Folder for the packages."})


class EmojiDocuments:
    """
    A captioned picture, or with probability `story_share` a text with two or three of them. Document i depends only on
    `seed` and i.
    """

    def __init__(self, emoji: list[Emoji], size: int, length: int, story_share: float, packages: Path, seed: int = 0):
        self.emoji, self.length, self.story_share, self.seed = emoji, length, story_share, seed
        self.pictures = [load_picture(one, size, packages=packages) for one in emoji]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([self.seed, index])
        chosen = rng.choice(len(self.emoji), rng.integers(2, 4) if rng.random() < self.story_share else 1)
        captions = [self.caption(self.emoji[i], rng) for i in chosen]
        images = [self.pictures[i] for i in chosen]
        if len(chosen) == 1:
            return {"text": captions[0], "image": images[0]}
        return {"text": " ".join(f"{caption}<image>" for caption in captions), "images": images}

    @staticmethod
    def caption(emoji: Emoji, rng: np.random.Generator) -> str:
        phrase = PHRASES[rng.integers(len(PHRASES))]
        return phrase.format(emoji.wordings[rng.integers(len(emoji.wordings))], category=emoji.category.lower())


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_special_tokens(tokenizer)


def build_model(args: Arguments, texts: list[str]) -> tuple:
    decoder = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=-(-args.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=1024,
        initializer_range=0.04,
        tie_word_embeddings=True,
    )
    return new_transfusion(
        train_tokenizer(texts),
        decoder,
        latent_channels=3,
        sample_size=args.image_size,
        patch_size=args.patch_size * args.image_size // 32,
        patch_encoder=args.patch_encoder,
        prediction_type=args.prediction_type,
        pos_embed_type="sincos",
        diffusion_loss_weight=args.diffusion_loss_weight,
        train_timestep_shift=args.train_timestep_shift,
    )


def main(argv: list[str] | None = None) -> TransfusionTrainer:
    (args,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses(args=argv)
    set_seed(args.seed)
    emoji, _ = split(load_emoji(Path(args.packages), tuple(args.categories)))
    length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    documents = EmojiDocuments(emoji, args.image_size, length, args.story_share, Path(args.packages), args.seed)
    texts = [documents.caption(one, np.random.default_rng(i)) for one in emoji for i in range(20)]
    model, processor = build_model(args, texts)
    model.generation_config.update(num_inference_steps=50, image_guidance_scale=1.0, max_new_tokens=24)
    trainer = TransfusionTrainer(
        model,
        args,
        train_dataset=documents,
        data_collator=TransfusionDataCollator(processor, max_length=args.max_length),
        processing_class=processor,
        callbacks=ema_callbacks(args.ema_decay),
    )
    trainer.train(resume_from_checkpoint=resume_from(args))
    trainer.save_model()
    trainer.create_model_card(model_name="emoji", license="apache-2.0")
    if args.process_index == 0:
        command = ("python", "examples/judge_emoji.py", args.output_dir, "--categories", *args.categories)
        say_next(Path(args.output_dir), *command)
    return trainer


if __name__ == "__main__":
    main()
