"""Owns the way from a data file to token ids. Read in this order:

json_rows   from a JSON file of any length to rows
examples    from rows to validated examples
prompts     from examples and a template to token ids
"""
