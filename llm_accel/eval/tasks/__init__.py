"""What is evaluated: needle in a haystack, RULER, vision, speed and memory."""
