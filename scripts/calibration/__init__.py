"""How often is diag wrong? Small honest trainings, broken on purpose and left whole, each watched as a user would.

A *program* (`programs_*.py`) is one training script: a model family x data x optimizer x size. A *fault*
(`faults_*.py`) is one change to a program, with the causes that count as naming it. A *healthy kind* (`healthy.py`)
is a change that leaves a training sound and looks unusual. `suite.py` lists the cases, `runner.py` runs them and
keeps a row of each, `scores.py` counts, `tables.py` draws. Which programs choose thresholds and which score them
stands in `split.json`, and `split.py` says why.
"""
