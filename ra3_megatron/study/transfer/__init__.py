"""What mid-training is worth to RL: the same RLVR from several starts (`ra3 study rlvr-transfer`)."""
