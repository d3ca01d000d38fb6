"""Writes the card of each preset beside this file: python model_cards/write_model_cards.py"""

from pathlib import Path

import torch
from huggingface_hub import ModelCard

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion
from transfusion_hf.hub.card import make_model_card

PRESETS = ("0.16B", "0.37B", "0.76B", "1.4B", "7B")


def preset_card(preset: str) -> ModelCard:
    config = TransfusionConfig.from_preset(preset)
    with torch.device("meta"):
        num_parameters = TransfusionForCausalLMAndDiffusion(config).num_parameters()
    return make_model_card(
        config, f"Transfusion {preset}", preset=preset, num_parameters=num_parameters, license="apache-2.0"
    )


def main() -> None:
    for preset in PRESETS:
        preset_card(preset).save(Path(__file__).with_name(f"{preset}.md"))


if __name__ == "__main__":
    main()
