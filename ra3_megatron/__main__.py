"""`python -m ra3_megatron` is the `ra3` command."""

from ra3_megatron.cli import main

if __name__ == "__main__":
    main()
