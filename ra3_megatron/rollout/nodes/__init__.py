"""Engines on nodes of their own (`rollout.placement=nodes`).

    rollout node: `ra3 engines`, host.py                  trainer: rank 0, owner.py
    reads DIR/vllm/meeting.json until it is there  ◄──    writes it: addresses, port, key of this attempt
    Offer(node, address, cores, GPUs)              ──►    deals out engines when there is room for all
                                                   ◄──    Begin(number, spec, log), for each engine
    starts ordinary vLLM processes
    Begun(number, address, key), or Failed         ──►    talks to the engines themselves from then on
                                                   ◄──    End(number): asked for its end, or how it ended
    Ended(number, how)                             ──►
                                                   ◄──    Done: the run is finished

Invariants:
- Engines end with the host, and the host ends them when the trainer's connection closes. It then waits for the next
  attempt, until it is told Done or is asked to end.
- What another attempt left in the folder cannot confuse: both sides prove that they know the key of this attempt
  before anything is unpickled.
- The folder is shared, not necessarily under one path: messages name files in it by their names.
"""
