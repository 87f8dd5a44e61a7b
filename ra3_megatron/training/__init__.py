"""What all trainings share: phases that can be killed and resumed, rows of tokens, what a step reports."""
