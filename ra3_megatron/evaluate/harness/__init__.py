"""Programs that run the harnesses' own code, one file each, started by path inside the sandbox.

They import nothing of ours. Each reads one JSON request from stdin and writes one JSON answer to stdout; what the
harness prints goes to stderr. Exit code 64: the harness cannot be imported.
"""
