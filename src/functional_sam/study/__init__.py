"""Comparisons of methods, whatever the task: tune with equal trials, report on other seeds, compare in pairs.

A study (configs/studies/NAME.yaml) names entries, the lines of a comparison, and cells, the settings in which they are compared. It
knows no figure and trains nothing: it says which runs are needed, and reads their records from a source that is passed.

To read it: design.py says what a study is and makes the config of each run, tune.py finds the runs that are known so far and what
was chosen, compare.py judges differences, dose.py averages the dose of a run, report.py makes a study's table of all of these.
"""
