"""Speed and memory of methods side by side on one machine, against dense baselines and the machine's own bounds."""
