"""
`transfusion train` as a script, for launchers: the paper's recipe (§4.1, arXiv 2408.11039) on several processes.

    torchrun --nproc_per_node 8 examples/train.py --preset 0.76B --tokenizer_name TOKENIZER --vae_name_or_path VAE \
        --text_dataset 'web/*.parquet' --caption_dataset 'pictures/*.parquet' --caption_column caption \
        --output_dir outputs/train --bf16 --per_device_train_batch_size 64 --dataloader_num_workers 4

`transfusion_hf.cli.train` explains the arguments and does the work.
"""

import os

# Read when torch is imported; examples/common.py says why.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from transfusion_hf.cli.train import main

if __name__ == "__main__":
    main()
