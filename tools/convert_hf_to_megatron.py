"""A Hugging Face folder becomes a checkpoint:
`python tools/convert_hf_to_megatron.py …` is `ra3 convert hf-to-megatron …`."""

import sys

from ra3_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "hf-to-megatron"]
    main()
