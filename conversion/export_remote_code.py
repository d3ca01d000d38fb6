"""
Updates a checkpoint of an older version, so that it loads with `trust_remote_code=True` without this package:

    python conversion/export_remote_code.py outputs/model

It writes this version's code beside the weights and names it in `config.json` and `processor_config.json`; the weights
stay unchanged. `save_pretrained` does the same for new checkpoints.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoConfig, AutoProcessor
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from transfusion_hf import TransfusionConfig


def export_remote_code(folder: Path) -> None:
    if not (folder / CONFIG_NAME).is_file():
        raise SystemExit(f"{folder} holds no {CONFIG_NAME}; pass the folder of a checkpoint.")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, TransfusionConfig):
        raise SystemExit(f"{folder} holds a {config.model_type!r}, not a Transfusion.")
    with TemporaryDirectory(dir=folder) as aside:
        config.save_pretrained(aside)
        if (folder / PROCESSOR_NAME).is_file():
            AutoProcessor.from_pretrained(folder).save_pretrained(aside)
        # The files that name the code come last, once all of it is there.
        files = [file for file in Path(aside).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name.endswith("config.json")):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    export_remote_code(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
