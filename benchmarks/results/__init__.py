"""What docs/results states: each experiment's plan, its measurement, and the pages made of both.

``python -m benchmarks.results measure`` runs what is missing, and ``python -m benchmarks.results
pages`` writes docs/results from docs/results/data. It is no part of the package that is installed:
a plan is fixed for the texts and the model of these pages, while all that it calls takes any.
"""
