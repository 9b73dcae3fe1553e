"""Owns the way from a data file to token ids. Read in this order:

sources     from a file, or another place, to rows: json_rows, table_rows
row_shapes  from what a row holds to an example
examples    from rows to validated examples
split       which examples are public, and what sets have in common
chat        from conversations and the base's own template to token ids
prompts     from examples and a prompt to token ids
"""
