"""What is done with the paper's layer.

tasks, text and haystack are what is learned, positions how far apart it may lie; training is the
loop, train its command line; evaluate, logs, checkpoint and interrupts serve it. distributed
spreads a batch over several processes, context_parallel one long sequence. depths and coherence
look at what was learned: the needle map, and how alike neighbours choose.

runs are resumable pieces of long work; those that end in _runs, and selection_long, say which, and
experiments is their table and command. origin says what made a record; environment asks whether
this computer is ready.
"""
