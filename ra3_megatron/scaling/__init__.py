"""What a run costs before it is started: parameters, FLOPs, memory, step time, the best layouts.

Pure arithmetic on an architecture, a layout and a GPU's data sheet; imports neither torch nor Megatron-Core.
"""
