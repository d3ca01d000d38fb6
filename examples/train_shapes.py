"""
Trains a small Transfusion from scratch on captioned pictures of shapes (docs/shapes.md), which `transfusion evaluate`
then judges with their exact checker.

    OMP_NUM_THREADS=2 python examples/train_shapes.py
    transfusion evaluate outputs/shapes --tasks shapes

The model is that of `examples/finetune_editing.py`, with about 1.4M parameters and whole words as tokens, but with
patches of 8×8, which make a step cheaper. After 2,000 steps colors are right and kinds, numbers and positions often
wrong; train longer for more. It takes all arguments of transformers' `TrainingArguments`;
`--resume_from_checkpoint true` continues a run.
"""

from dataclasses import dataclass

from common import ShapesTrainingArguments, build_shapes_model, say_next
from transformers import HfArgumentParser, set_seed

from transfusion_hf import TransfusionDataCollator, TransfusionTrainer
from transfusion_hf.data.shapes import ShapesDataset
from transfusion_hf.training.checkpoints import resume_from


@dataclass
class Arguments(ShapesTrainingArguments):
    caption_first_probability: float = 0.7
    image_guidance_scale: float = 2.0
    num_inference_steps: int = 20
    num_train_timesteps: int = 1000


def main(argv: list[str] | None = None) -> TransfusionTrainer:
    (args,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses(args=argv)
    set_seed(args.seed)
    # Each sample is drawn when it is read, and none is read twice.
    train_set = ShapesDataset(args.max_steps * args.train_batch_size * args.world_size, seed=args.seed)
    words = [train_set.scene(i % len(train_set)).caption for i in range(1000)]  # surely all of them
    model, processor = build_shapes_model(words, patch_size=8, num_train_timesteps=args.num_train_timesteps)
    trainer = TransfusionTrainer(
        model,
        args,
        train_dataset=train_set,
        data_collator=TransfusionDataCollator(
            processor,
            caption_first_probability=args.caption_first_probability,
            num_train_timesteps=model.config.num_train_timesteps,
        ),
        processing_class=processor,
    )
    model.generation_config.update(
        image_guidance_scale=args.image_guidance_scale, num_inference_steps=args.num_inference_steps
    )
    trainer.train(resume_from_checkpoint=resume_from(args))
    trainer.save_model()
    if args.process_index == 0:
        say_next(args.output_dir, "transfusion", "evaluate", args.output_dir, "--tasks", "shapes")
    return trainer


if __name__ == "__main__":
    main()
