"""What is done with the paper's layer.

tasks and text are what is learned; training is the loop, train its command line; evaluate, logs and
checkpoint serve it. distributed divides its batches among several processes; context_parallel
spreads one long sequence over them. runs are resumable pieces of long work; rule_runs,
neighbour_runs and selection_runs say which, and experiments is their table and command.
environment asks whether this computer is ready.
"""
