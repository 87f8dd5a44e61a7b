"""What ground truth says of a HopProg study: the gate, the predictions and their verdicts, figures, the page."""
