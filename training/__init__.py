"""What made the bundled models: run from a checkout, no part of the package."""
