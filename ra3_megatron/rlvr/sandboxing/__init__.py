"""What the sandbox is made of: the wall (bubblewrap, seccomp), the watch over a command, the programs inside."""
