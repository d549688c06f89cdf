"""The reproduction suite: tasks, runs, comparisons and reports, behind the command ``cdat``."""
