"""A model quantised to FP8 for serving: `python tools/export_fp8.py …` is `ra3 convert fp8 …`."""

import sys

from ra3_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "fp8"]
    main()
