"""The course's pictures, and the explorer of a selection."""
