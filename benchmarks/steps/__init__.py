"""From the teaching kernel to the shipped one, one change a file; notebook 13 reads them.

    python -m benchmarks.steps --list          the steps, and what each changes
    python -m benchmarks.steps --difference    the lines that change from step to step
    python -m benchmarks.steps --compile       without a GPU -> results/steps_compiled.json
    python -m benchmarks.steps                 times, on a GPU -> results/steps.json

    forward_1 .. 5    notebook 10's kernel becomes selected_forward; 6 was tried and is not shipped
    dq_1 .. 3         the same for selected_dq
    dkdv_1 .. 4       notebook 11's kernel becomes selected_dkdv

Each file has one kernel and `run`, which takes a Case (case.py) and equals the reference. They are
shorter than the package's: 16 heads or more a group, one width, one sequence, no gates, no pieces.
"""
