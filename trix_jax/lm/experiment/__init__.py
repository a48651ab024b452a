"""Many runs: what is asked, which run comes next, a process a run, what they say."""
