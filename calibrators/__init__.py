"""Training-free attention calibration methods: what they are, without any engine.

`interface` is the contract, one file per method implements it, `registry` finds them and
`reference` states the mathematics densely. Nothing here knows vLLM or HTTP.
"""
