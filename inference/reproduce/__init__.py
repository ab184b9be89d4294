"""The paper's figures and tables, run by our own program: `python -m inference.reproduce`.

`cases` says which methods there are, on which data and at which sizes; `targets` which of them a
figure needs, and what the paper says came out. `queue` runs what is missing, `results` collects
what is there, `claims` decides what agrees, and `page` writes it down.
"""
