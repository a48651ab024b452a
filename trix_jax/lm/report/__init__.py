"""Pages: `record` reads a run, `run` and `demo` write REPORT.md, `page` and `plots` are
their words and figures, `trackers` send metrics elsewhere.
"""
