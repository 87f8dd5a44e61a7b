"""Do a folder and a checkpoint hold one model? `python tools/check_conversion.py …` is `ra3 convert check …`."""

import sys

from ra3_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "check"]
    main()
