"""Scaling studies: short trainings at several numbers of processes, layouts and sizes, beside predictions.

A cell is one measurement: an arm (a size at a layout with a global batch) and a repeat. Cells run one at a time, as a
measurement must not share the machine.
"""
