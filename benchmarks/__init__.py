"""Speed, measured: `make bench` compares with a peer on the same work in the same run and writes a table.

`mstep` training step against a Hugging Face Llama and this machine's matrix-product rate; `rollout` jump-ahead against
naive sampling. Repeats of the two sides alternate, so that whatever else the machine does hits both.
"""
