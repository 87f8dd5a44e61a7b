"""A checkpoint becomes a Hugging Face folder:
`python tools/convert_megatron_to_hf.py …` is `ra3 convert megatron-to-hf …`."""

import sys

from ra3_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "megatron-to-hf"]
    main()
