"""Public sets that `python -m envs fetch` can download: where they live, their licence, and what is known of them.

A digest is given where the publisher states one (BurstGPT's are the object ids that Git LFS keeps of its files, which
are SHA-256 of the content); the other sets are published without one, and a download of them is said to be unverified.
"""

from __future__ import annotations

from dataclasses import dataclass

_AZURE_REPOSITORY = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data"
_AZURE_BLOBS = "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace"
_BURSTGPT = "https://media.githubusercontent.com/media/HPMLL/BurstGPT/5d93d820d9b6bee4e26914df003e5713538164ae/data"
_MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces"


@dataclass(frozen=True)
class Download:
    """One file of a public set.

    Attributes:
        url: its public home.
        licence: as stated there.
        trace_format: how to read it.
        sha256: published digest; empty: none is known.
        size_bytes: published size; 0: unknown.
    """

    url: str
    licence: str
    trace_format: str
    sha256: str = ""
    size_bytes: int = 0


def _azure(url: str) -> Download:
    return Download(url, "CC-BY-4.0", "azure-llm")


def _burstgpt(name: str, sha256: str, size_bytes: int) -> Download:
    return Download(f"{_BURSTGPT}/{name}", "CC-BY-4.0", "burstgpt", sha256, size_bytes)


CATALOG: dict[str, Download] = {
    "azure-2023-code": _azure(f"{_AZURE_REPOSITORY}/AzureLLMInferenceTrace_code.csv"),
    "azure-2023-conversation": _azure(f"{_AZURE_REPOSITORY}/AzureLLMInferenceTrace_conv.csv"),
    "azure-2024-code": _azure(f"{_AZURE_BLOBS}/AzureLLMInferenceTrace_code_1week.csv"),
    "azure-2024-conversation": _azure(f"{_AZURE_BLOBS}/AzureLLMInferenceTrace_conv_1week.csv"),
    "burstgpt-1": _burstgpt(
        "BurstGPT_1.csv", "4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122", 52283111
    ),
    "burstgpt-1-answered": _burstgpt(
        "BurstGPT_without_fails_1.csv", "a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4", 51429517
    ),
    "mooncake-conversation": Download(f"{_MOONCAKE}/conversation_trace.jsonl", "Apache-2.0", "mooncake"),
    "mooncake-synthetic": Download(f"{_MOONCAKE}/synthetic_trace.jsonl", "Apache-2.0", "mooncake"),
    "mooncake-toolagent": Download(f"{_MOONCAKE}/toolagent_trace.jsonl", "Apache-2.0", "mooncake"),
}
