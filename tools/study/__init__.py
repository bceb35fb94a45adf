"""The reference study: does the order of tokens help a network to learn?

The protocol is nbs/25_study_protocol.ipynb, the results are nbs/26_study_results.ipynb;
`python tools/run_study.py` trains what is not stored yet.
"""
