"""What a comparison of methods is made of; `experiments.compare` runs one."""
