"""Which heads retrieve: detectors, their profile, the command."""
