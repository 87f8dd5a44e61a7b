"""The programs that run inside the sandbox, with the standard library alone: a trusted runner, and the process that
executes the candidate's code.

The modules here import each other relatively, and nothing else of this package: the sandbox binds compiled copies of
them. Start-up time counts, so they import little.
"""
