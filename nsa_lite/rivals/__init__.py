"""Other ways to choose blocks, other systems that read less, and how they are compared.

rules choose without weights, taught with weights of their own, successors as methods after NSA do;
attentions has one record for each attention that can be trained. neighbours are other systems,
budgets their records and costs.
"""
