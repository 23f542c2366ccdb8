"""What is done with the paper's layer.

tasks, text and haystack are what is learned; training is the loop, train its command line;
evaluate, logs and checkpoint serve it, and distributed spreads a batch over several processes.
curriculum is the loop for long sequences, train_long its command line; context_parallel spreads one
long sequence. runs are resumable pieces of long work; rule_runs, neighbour_runs, selection_runs
and selection_long say which, and experiments is their table and command. origin says what made a record; environment
asks whether this computer is ready.
"""
