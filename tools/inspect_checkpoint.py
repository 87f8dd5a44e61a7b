"""What is in a checkpoint: `python tools/inspect_checkpoint.py DIR [--verify]` is `ra3 inspect DIR [--verify]`."""

import sys

from ra3_megatron.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "inspect")
    main()
