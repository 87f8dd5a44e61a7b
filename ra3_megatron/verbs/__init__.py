"""What the verbs of `ra3` that train or sample do: from a configuration to a finished folder."""
