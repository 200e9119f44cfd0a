"""Times a start in this process, from before the first import to the first token; then serves 16 and says its peak memory.

usage: python -m benchmarks.start ARTIFACT
"""

from __future__ import annotations

import argparse
import json
import resource
import time

START = time.perf_counter()


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    artifact = parser.parse_args().artifact
    import torch

    imported_torch = time.perf_counter()
    from multibatch import LLM, SamplingParams

    imported = time.perf_counter()
    llm = LLM(artifact)
    opened = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([list(range(100, 116))], params, use_tqdm=False)
    first = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    llm.generate([list(range(i, i + 128)) for i in range(16)], params, use_tqdm=False)
    record = {
        "artifact": artifact,
        "import_torch_s": round(imported_torch - START, 2),
        "import_multibatch_s": round(imported - imported_torch, 2),
        "open_s": round(opened - imported, 2),
        "first_token_s": round(first - opened, 2),
        "start_to_first_token_s": round(first - START, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "torch": torch.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
