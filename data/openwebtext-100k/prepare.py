"""Tokenize 100,000 documents of OpenWebText into data/openwebtext-100k/openwebtext_{train,val}_NNNNNN.bin.

Source: the Hugging Face data set mychen76/openwebtext-100k.
Output: GPT-2 tokens, 50256 before each document. Val is 0.05% of the documents, the same ones each time.
Run the same command again to continue after an interruption.

    python data/openwebtext-100k/prepare.py
    python data/openwebtext-100k/prepare.py --num_proc=8 --shard_tokens=10_000_000
    python data/openwebtext-100k/prepare.py --source=/path/to/folder-of-parquet-files --val_fraction=0.01
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]  # for nanofp8 and common, from any working directory
from nanofp8.config import explain_early_errors  # noqa: E402

if __name__ == "__main__":
    explain_early_errors(__file__)  # of a Python without numpy

from common import prepare_main  # noqa: E402

if __name__ == "__main__":  # worker processes may import this file
    prepare_main(__doc__, source="mychen76/openwebtext-100k", name="openwebtext", out_dir=HERE)
