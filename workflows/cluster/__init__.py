"""What a Ray is asked before work starts on it.

In reading order: capacity (what it has room for), waiting (for the first node), nodes (whether they can do
the work), pool (of a batch job's engines).
"""
