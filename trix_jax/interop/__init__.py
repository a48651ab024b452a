"""In and out: files and formats of other programs."""
