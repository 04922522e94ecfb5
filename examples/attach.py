"""The shortest way: one running engine joins the cache of its Ray cluster.

    python examples/attach.py MODEL        (a folder or a name that vLLM loads)

Run it twice, or on two nodes of one Ray cluster: the second run finds what the first computed.
"""

import sys

from vllm import LLM

import kvray

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=4096)
    attachment = kvray.attach(llm)
    print(llm.generate("The way of a block begins")[0].outputs[0].text)
    print(attachment.stats().to_frame().to_string(index=False))
