"""A Space of the Hub with the page of `transfusion app`. Its variable `MODEL` names the model's repository."""

import os

from transformers import AutoModelForMultimodalLM, AutoProcessor

import transfusion_hf  # noqa: F401  registers the Auto classes
from transfusion_hf.cli.app import launch_app

if not (name := os.environ.get("MODEL")):
    raise SystemExit("Set the Space's variable MODEL to the repository of a Transfusion, such as 'user/emoji'.")
model = AutoModelForMultimodalLM.from_pretrained(name).eval()
launch_app(model, AutoProcessor.from_pretrained(name), server_name="0.0.0.0")  # a Space is reached from outside
