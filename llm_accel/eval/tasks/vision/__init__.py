"""Vision evaluation: synthetic scenes, questions with known answers."""
