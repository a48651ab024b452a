"""Steps on the disk: `checkpoint` saves and restores, `step_files` knows folders and
hashes, `arrays` the leaves of a tree. Knows no config.
"""
