"""Other ways of keeping features on disk, each behind the contract of `base.py`, and what is measured of them.

One file a peer, with the settings that its documentation recommends for records of megabytes; `catalogue.py` lists
them. `speed`, `opening`, `killed` and `flipped` measure one thing each of any peer, `row` all of them, `table`
makes the table of the READMEs from a result. The script is `benchmarks/bench_peers.py`.
"""
