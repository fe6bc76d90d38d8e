"""Tokenize 100,000 documents of OpenWebText into data/openwebtext-100k/openwebtext_{train,val}_NNNNNN.bin.

The text is the Hugging Face dataset mychen76/openwebtext-100k. GPT-2 tokens, 50256 before each document,
0.05% of the documents as val (always the same ones). An interrupted run goes on where it stopped.

    python data/openwebtext-100k/prepare.py
    python data/openwebtext-100k/prepare.py --num_proc=8 --shard_tokens=10_000_000
    python data/openwebtext-100k/prepare.py --source=/path/to/folder-of-parquet-files
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # data/common.py, from any working directory
from common import prepare_main  # noqa: E402

if __name__ == "__main__":  # the worker processes may import this file again
    prepare_main(__doc__, source="mychen76/openwebtext-100k", name="openwebtext", out_dir=HERE)
