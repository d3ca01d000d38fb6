"""
What a language model needs to learn to draw. A small Llama learns text alone, is frozen, and then learns the digits of
the quickstart, once with separate image weights (`untied_modalities`) and once with its image parts alone. Its text
logits are compared bit for bit with those before. The second part measures what the image weights cost in time.

    python benchmarks/untied.py [--parts digits cost] [--plans image_weights image_parts] [--max_steps 2000]
        [--output_dir outputs/benchmarks]

Prints Markdown tables, and writes them and `results.json`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ratios import Row, compare, make_parser, setting, table, write
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion
from transfusion_hf.modality_transfusion import image_name
from transfusion_hf.training.plans import TRAINING_PLANS, set_trainable

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from common import WORDS, Judge, build_model, caption, draw, load_split, read, share_read, train, train_tokenizer


def sentences() -> list[str]:
    """What the language model learns: captions, what they show, sums up to nine, the order of the digits."""
    shown = [f"{caption(a)} and {caption(b)} show {WORDS[a]} and {WORDS[b]}" for a in range(10) for b in range(10)]
    sums = [f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]}" for a in range(10) for b in range(10 - a)]
    order = [f"after {WORDS[i]} comes {WORDS[i + 1]}" for i in range(9)]
    return [caption(label) for label in range(10)] * 4 + shown + sums + order


def train_language_model(llama: LlamaForCausalLM, tokenizer, num_steps: int, folder: Path) -> None:
    texts = [{"input_ids": tokenizer(text + tokenizer.eos_token)["input_ids"]} for text in sentences()]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(llama, arguments, train_dataset=texts * 20, data_collator=collator).train()
    llama.eval()


@torch.no_grad()
def text_logits(model, tokenizer) -> list[torch.Tensor]:
    return [model(**tokenizer(text, return_tensors="pt")).logits for text in sentences()]


def share_of_sums(model, tokenizer) -> float:
    """Share of the sums that it completes."""
    sums = [text.rsplit(" ", 1) for text in sentences() if " plus " in text]
    inputs = tokenizer([question for question, _ in sums], return_tensors="pt", padding=True)
    kwargs = {"generation_mode": "text"} if isinstance(model, TransfusionForCausalLMAndDiffusion) else {}
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id, **kwargs)
    said = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([text.strip() == answer for text, (_, answer) in zip(said, sums, strict=True)]))


def learn_to_draw(args, plan: str, llama: LlamaForCausalLM, sets, judge, expected) -> dict:
    """Trains by one plan, from the trained language model, and judges what it draws and reads."""
    train_set, held_out = sets
    set_seed(args.seed)
    model, processor = build_model(train_tokenizer(), untied_modalities=["image"])
    weights = llama.model.state_dict()
    copies = {image_name(name): weight for name, weight in weights.items()}
    model.model.language_model.load_state_dict({**weights, **copies}, strict=False)
    trained = set_trainable(model, plan)
    folder, schedule = args.output_dir / plan, (args.max_steps, args.learning_rate, args.seed)
    results = train(model, processor, train_set, held_out, folder, *schedule, caption_first_probability=0.8)
    num_trained = sum(p.numel() for name, p in model.named_parameters() if name in set(trained))

    model = AutoModelForMultimodalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    is_equal = all(map(torch.equal, text_logits(model, processor.tokenizer), expected))
    sums = share_of_sums(model, processor.tokenizer)
    labels = [label for label in range(10) for _ in range(args.per_class)]
    # A frozen language model never says <BOI>.
    drawn = draw(model, processor, [caption(label) for label in labels], generation_mode="image")
    captions = read(model, processor, held_out, max_images=0)
    sheet = Image.new("L", (10 * 9, 10 * 9), 128)
    for label in range(10):
        for column, picture in enumerate(drawn[label * args.per_class :][: min(args.per_class, 10)]):
            sheet.paste(picture.convert("L"), (9 * column, 9 * label))
    sheet.resize((720, 720), Image.Resampling.NEAREST).save(args.output_dir / f"{plan}.png")
    return {
        "plan": plan,
        "parameters": num_trained,
        "steps": results["train_steps"],
        "train_seconds": results["train_seconds"],
        "draw_accuracy": float(judge.is_right(drawn, labels).mean()),
        "caption_accuracy": share_read(captions, held_out),
        "text_logits_equal": is_equal,
        "sums": sums,
    }


def digits(args: argparse.Namespace) -> str:
    set_seed(args.seed)
    train_set, held_out = sets = load_split()
    judge = Judge(train_set)

    # With rows for the three image tokens from the start, so that logits can be compared bit for bit.
    text_config = build_model(train_tokenizer())[0].config.text_config
    tokenizer = train_tokenizer()  # a second one, because `build_model` adds special tokens to the first
    llama = LlamaForCausalLM(text_config)
    start = time.perf_counter()
    train_language_model(llama, tokenizer, args.text_steps, args.output_dir / "trainer")
    seconds = time.perf_counter() - start
    expected, sums = text_logits(llama, tokenizer), share_of_sums(llama, tokenizer)

    lines = [
        "| trained | parameters | steps | s | digits drawn right | captions read right | text logits | sums |",
        "|---|---|---|---|---|---|---|---|",
        f"| the language model, on text | {llama.num_parameters():,} | {args.text_steps} | {seconds:.0f} | | | | "
        f"{sums:.2f} |",
    ]
    results = []
    for plan in args.plans:
        row = learn_to_draw(args, plan, llama, sets, judge, expected)
        results.append(row)
        lines.append(
            f"| {plan} | {row['parameters']:,} | {row['steps']} | {row['train_seconds']:.0f} | "
            f"{row['draw_accuracy']:.3f} of {10 * args.per_class} | "
            f"{row['caption_accuracy']:.3f} of {len(held_out)} | "
            f"{'equal to the bit' if row['text_logits_equal'] else 'CHANGED'} | {row['sums']:.2f} |"
        )
        print("\n".join(lines))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return "\n".join(lines)


def cost(args: argparse.Namespace) -> str:
    """Whole training steps of a model of 13M parameters, half of whose positions are patches."""
    sizes = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    ids = {"image_start_token_id": 1021, "image_token_id": 1022, "image_end_token_id": 1023}
    models, device = {}, torch.device("cpu")
    for name, untied in (("untied", ["image"]), ("tied", None)):
        config = TransfusionConfig(
            text_config=LlamaConfig(num_attention_heads=8, **sizes),
            untied_modalities=untied,
            **ids,
        )
        models[name] = TransfusionForCausalLMAndDiffusion(config).train()
    image = [1021] + [1022] * 64 + [1023]
    row = torch.randint(0, 1000, (62,)).tolist() + image + torch.randint(0, 1000, (62,)).tolist() + image
    both, text = torch.tensor([row] * 4), torch.randint(0, 1000, (4, len(row)))
    latents = torch.randn(8, 8, 16, 16)

    def step(model, input_ids, **kwargs) -> None:
        labels = torch.where(input_ids >= 1022, -100, input_ids)
        model(input_ids, labels=labels, **kwargs).loss.backward()
        model.zero_grad()

    def runs(inputs: torch.Tensor, **kwargs):
        return {name: lambda model=model: step(model, inputs, **kwargs) for name, model in models.items()}

    rows: list[Row] = compare(
        "training step, half patches", runs(both, latents=latents), 1.25, "4 rows of 256", args.rounds, device
    )
    rows += compare("training step, text alone", runs(text), 1.25, "4 rows of 256", args.rounds, device)
    return table(rows)


PARTS = {"digits": digits, "cost": cost}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--plans", nargs="+", choices=TRAINING_PLANS, default=["image_weights", "image_parts"])
    parser.add_argument("--text_steps", type=int, default=400)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_class", type=int, default=30, help="digits to draw of each class")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tables = "\n\n".join(PARTS[part](args) for part in args.parts)
    command = " ".join(["python benchmarks/untied.py", *sys.argv[1:]])
    write(f"# Untied image weights\n\n{setting(args.device)}, `{command}`.\n\n{tables}\n", "untied", args)


if __name__ == "__main__":
    main()
