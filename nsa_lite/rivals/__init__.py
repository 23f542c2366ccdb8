"""Other ways to choose blocks, other systems that read less, and how they are compared."""
