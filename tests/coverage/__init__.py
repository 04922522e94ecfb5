"""What of vLLM kvray takes, for each name that vLLM has: listed by code, so that nothing is missing
and nothing is said that is not so.
"""
