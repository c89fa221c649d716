"""Made-up measurements that follow simple rules, to check what is derived from them."""

from dataclasses import replace

from benchmarks.cases import Case, Denoiser
from benchmarks.results import summary
from benchmarks.worker import encode

GROWTH = {
    "LocalDiT": 1.0,
    "LocalDiT with global context": 1.0,
    "LocalDiT f32": 1.0,
    "PixArt": 2.0,
    "Sana-0.6B": 1.0,
}


def seconds(denoiser: Denoiser, layers: int, case: Case, turn: int) -> float:
    """Return half a second outside the blocks, plus a time per block that grows with tokens."""
    return 0.5 + layers * (case.tokens / 256) ** GROWTH[denoiser.name] * (1 + turn / 10)


def times(case: Case) -> dict:
    """Return times in the format of `timing.measure_times`."""
    return {
        denoiser.name: {
            "attention": [],
            "attention_choice": "made up",
            "runs": [
                {
                    "layers": layers,
                    "first_call": 10.0 + seconds(denoiser, layers, case, 1),
                    "seconds": [seconds(denoiser, layers, case, t) for t in range(case.repeats)],
                }
                for layers in case.measured_layers(denoiser)
            ],
        }
        for denoiser in case.denoisers
    }


def memory(layers: int) -> dict:
    """Return memory in the format of `peak_memory.measure_memory`."""
    return {"weights": 1000 + 200 * layers, "beside": 300 + 50 * layers}


def record(case: Case) -> dict:
    """Return a record in the format of `denoiser.measure`."""
    results = times(case)
    for result in results.values():
        for run in result["runs"]:
            run["memory"] = memory(run["layers"])
    return {
        "case": encode(case),
        "tokens": case.tokens,
        "results": results,
        "summary": summary(case, results),
    }


def records(case: Case, pixels: list[int]) -> list[dict]:
    """Return one record per size."""
    return [record(replace(case, pixels=side)) for side in pixels]
